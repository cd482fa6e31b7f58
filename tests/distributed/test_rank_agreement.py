"""Two ranks decide alike: what depends on one of them is decided once, and a difference ends the run with its name."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_npr.data.synthetic_tasks import demo_problems
from megatron_npr.demo.base import FOLDER
from megatron_npr.monitoring.metrics import read_metrics
from tests.support.launch import run_worker, torchrun, worker_module

pytestmark = pytest.mark.slow

PLANTED = {
    "settings": "start: the settings of rank 1 are",
    "problems": "step 0: the problems of rank 1 are",
    "verdicts": "step 0: the verdicts of rank 1 are",
    "updates": "step 0: the updates of rank 1 are",
    "rows": "packing: the rows of rank 1 are",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, list[str | None]]:
    """What the ranks said of each fault; `slow` is a run in which the second rank's verifier is out of time at once.

    Gold answers are written with blanks, so that no right answer is decided without math-verify.
    """
    data = folder / "problems.jsonl"
    problems = [
        {"question": problem.question, "answer": problem.answer.replace(",", ", ")}
        for problem in demo_problems("train", 12, 0)
    ]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    began = time.monotonic()
    report: dict[str, list[str | None]] = json.loads(run_worker("agreement", [data, folder], 2))
    assert time.monotonic() - began < 240  # gloo waits for 1800 s
    return report


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_named_on_every_rank(name: str, said: dict[str, list[str | None]]) -> None:
    for message in said[name]:
        assert message is not None and message.startswith(PLANTED[name])


def test_a_verifier_that_is_too_slow_on_one_rank_changes_no_ranks_samples(
    folder: Path, said: dict[str, list[str | None]]
) -> None:
    assert said["slow"] == [None, None]
    lines = read_metrics(folder / "slow" / "metrics.jsonl")
    assert lines[0]["verifier_timeouts"] > 0  # the second rank's
    assert len(lines) == 1 and lines[0]["accuracy"] > 0 and lines[0]["grad_norm"] > 0
    assert (folder / "slow" / "model" / "model.safetensors").is_file()


def test_a_mistake_of_one_rank_alone_is_told(tmp_path: Path) -> None:
    """Its node has not the model, say, and rank 0 alone prints."""
    model = os.path.relpath(FOLDER)
    words = ["stage3", "--model.path", model, "--data.train", "demo", "--run.dir", tmp_path / "run"]
    with pytest.raises(AssertionError, match=f"npr: error: .*{model}"):
        torchrun(worker_module("alone"), words, 2)
