"""`npr profile`: seconds by phase of a run's steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_npr.cli import main
from megatron_npr.report.phases import phase_shares

STEPS = [
    {"step": 0, "loss": 1.0, "step_seconds": 4.0, "seconds/rollout": 3.0, "seconds/verify": 0.5},
    {"step": 1, "loss": None, "step_seconds": 6.0, "seconds/rollout": 4.0, "seconds/save": 2.0},
]


def test_phases_are_summed_over_the_steps_longest_first() -> None:
    shares = phase_shares(STEPS)
    assert shares is not None
    assert list(shares.phases.items()) == [("rollout", 7.0), ("save", 2.0), ("verify", 0.5)]
    assert (shares.steps, shares.seconds, shares.covered) == (2, 10.0, 0.95)
    lines = [line.split() for line in shares.table().splitlines()]
    assert lines[1] == ["rollout", "3.5000", "70.00%"]
    assert lines[-2] == ["other", "0.2500", "5.00%"]


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    assert main(["profile", str(tmp_path)]) == 0
    assert "rollout" in capsys.readouterr().out
    assert main(["profile", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["covered"] == 0.95


@pytest.mark.parametrize(
    ("content", "line"), [(None, "does not exist"), ('{"step": 0}\n', "no times of phases")]
)
def test_a_folder_without_times_is_one_line(
    content: str | None, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["profile", str(tmp_path)]) == 2
    assert line in capsys.readouterr().err
