import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_npr.cli import main
from megatron_npr.rollout_file import write_rollouts
from npr_engine.rollout import Rollout
from tests.unit.report.sample import rollout
from tests.unit.test_rollout_file import vocabulary


def traced(folder: Path, *rollouts: Rollout) -> list[str]:
    write_rollouts(folder / "rollouts.jsonl", rollouts, vocabulary())
    return ["trace", str(folder / "rollouts.jsonl"), "--out", str(folder / "trace.json")]


def test_concurrent_branches_are_counted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, pieces = rollout()
    assert main(traced(tmp_path, made, made)) == 0
    assert "2 rollouts, 2 with a block whose branches decoded in the same steps" in capsys.readouterr().out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    drawn = "".join(
        event["name"] for event in events if event["ph"] == "X" and event["tid"] == 2 and event["pid"] == 0
    )
    assert drawn == "".join(
        piece for piece, branch in zip(pieces, made.branch_ids, strict=True) if branch == 2
    )


def test_branches_one_after_the_other_are_not_parallel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = rollout()
    one_by_one = range(made.num_tokens)
    alone = replace(made, decode_steps=made.decode_steps * 0 + one_by_one)
    assert main(traced(tmp_path, alone)) == 0
    assert "1 rollouts, 0 with a block" in capsys.readouterr().out


def test_a_join_before_its_branches_end_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = rollout()
    early = made.decode_steps.copy()
    early[made.branch_ids == 1] += 3
    assert main(traced(tmp_path, replace(made, decode_steps=early))) == 1
    assert "p0/0: join at token" in capsys.readouterr().out
