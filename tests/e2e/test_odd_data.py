"""Data whose size fits no round and whose names are odd: stages train through it, each rollout with draws of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_npr.cli import main
from megatron_npr.data.synthetic_tasks import demo_problems
from megatron_npr.demo.base import FOLDER
from megatron_npr.monitoring.metrics import read_metrics
from megatron_npr.runtime.process_world import close_world
from tests.support.places import CONFIGS

DEMO = CONFIGS / "demo"
ODD_NAMES = ("a", "a/0", "0/0/0/0", "\ud800", "line\nbreak", "\u2028", "..", " ", "\x1f", "🙂", "x" * 5000)


@pytest.fixture(autouse=True)
def _leave_the_world() -> Iterator[None]:
    yield
    close_world()


def problems_file(folder: Path, count: int) -> Path:
    path = folder / "problems.jsonl"
    names = [*ODD_NAMES, *(f"id {number}" for number in range(count))][:count]
    records = [
        {"id": name, "question": problem.question, "answer": problem.answer}
        for name, problem in zip(names, demo_problems("train", count, 0), strict=True)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(stage: str, folder: Path, data: Path, overrides: Sequence[str]) -> None:
    words = [stage, str(DEMO / f"{stage}.toml"), "--run.dir", str(folder), "--model.path", str(FOLDER)]
    words += ["--data.train", str(data), "--rollout.max_tokens", "12", "--log.progress", "false"]
    assert main([*words, "--run.threads", "1", *overrides]) == 0


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
@pytest.mark.parametrize(
    ("count", "per_step", "steps"), [(24, 10, 3), (3, 4, 2), (1, 3, 2)], ids=["two passes", "few", "one"]
)
def test_a_round_may_span_passes(stage: str, count: int, per_step: int, steps: int, tmp_path: Path) -> None:
    sizes = {"rollout.prompts_per_step": per_step, "rollout.samples_per_prompt": 2, "train.steps": steps}
    overrides = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    run(stage, tmp_path / "run", problems_file(tmp_path, count), overrides)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(steps))
    for line in lines:  # every response is counted once, and a group for each turn
        assert line["cut"] + line["malformed"] == per_step * 2
        assert line["verifier_timeouts"] == line["verifier_deaths"] == 0
        assert line["flat_groups"] <= per_step if stage == "stage1" else line["dropped"] == per_step * 2


def test_rejection_sampling_tries_a_problem_of_any_name_again(tmp_path: Path) -> None:
    data = problems_file(tmp_path, len(ODD_NAMES))
    run("sample", tmp_path / "run", data, ["--sample.trials", "2"])
    assert [line["tried"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [
        len(ODD_NAMES)
    ] * 2
