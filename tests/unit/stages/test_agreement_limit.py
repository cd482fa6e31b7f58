"""The agreement of trainer and engine as a stage tells it: metrics of every step, a warning, a limit that ends the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npr.cli import main
from megatron_npr.demo.base import FOLDER
from megatron_npr.runtime.process_world import close_world
from tests.support.places import CONFIGS

ASSETS = FOLDER.parent


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    close_world()
    yield
    close_world()


def stage3(run: Path, **settings: object) -> int:
    """A step of what the base model can do: right and wrong answers in one group."""
    options = {
        "run.dir": run,
        "run.threads": 1,
        "model.path": FOLDER,
        "data.mode": "sequential",
        "data.instruction": ASSETS / "instruction_sequential_demo.txt",
        "rollout.branching": "false",
        "rollout.prompts_per_step": 8,
        "rollout.samples_per_prompt": 4,
        "rollout.max_tokens": 320,
        "rollout.kv_slots": 16384,
        "train.steps": 1,
        "log.backend": "none",
    } | {name.replace("__", "."): value for name, value in settings.items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return main(["stage3", str(CONFIGS / "demo/stage3.toml"), *words])


def test_a_step_tells_it_and_rounding_is_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage3(tmp_path / "run") == 0
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert line["skipped"] == 0
    assert 0 <= line["agreement/mean"] <= line["agreement/max"] < 1e-4
    assert line["agreement/trunk/mean"] == pytest.approx(line["agreement/mean"])
    assert line["agreement/forked/mean"] is None  # there is no branch
    assert line["sampler_shift"] < 1e-6  # temperature 1, nothing cut off
    assert "agreement" not in capsys.readouterr().err


def test_above_its_limit_the_run_ends_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"train__agreement_warning": 1e-12, "train__agreement_limit": 1e-12}
    assert stage3(tmp_path / "run", **limits) == 2
    said = capsys.readouterr().err
    assert "step 0: agreement/mean is" in said
    assert "npr: error: step 0: log-probs of trainer and engine differ by" in said
    assert "train.agreement_limit" in said
