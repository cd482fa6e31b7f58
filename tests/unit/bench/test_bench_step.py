"""`npr bench step`: both sides do the same work."""

from __future__ import annotations

import json

import pytest

from megatron_npr.cli import main
from megatron_npr.runtime.process_world import close_world


@pytest.fixture(autouse=True)
def _no_world() -> None:
    close_world()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_both_have_the_same_loss_before_their_first_update(
    dtype: str, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "2x128", "--shape", "1x192", "--layers", "1", "--pairs", "1", "--dtype", dtype]
    assert main(["bench", "step", "--against", "transformers", *words]) == 0
    shapes = json.loads(capsys.readouterr().out)["shapes"]
    assert [(one["sequences"], one["tokens"]) for one in shapes] == [(2, 128), (1, 192)]
    for one in shapes:
        ours, theirs = one["losses"]
        assert ours == pytest.approx(theirs, rel=tolerance)
        assert one["seconds"] > 0 and one["times_faster"] > 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--shape", "8"], "--shape is '8'"),
        (["--shape", "1x9999"], "1x9999"),
        (["--pairs", "0"], "--pairs is 0"),
    ],
)
def test_what_cannot_be_timed_is_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", *words]) == 2
    assert named in capsys.readouterr().err
