"""Rounds of an evaluation join to what the whole would have been, through the journal's JSON too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_npr.data.problem import Problem
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.monitoring.jumps import Share
from megatron_npr.stages.evaluate import Finished
from megatron_npr.stages.evaluation import ARRAYS, Evaluation
from npr_ext.errors import UserError

RNG = np.random.default_rng(0)
CORRECT = RNG.random((5, 3)) < 0.5
TOKENS = RNG.integers(1, 900, (5, 3))


def part(first: int, last: int) -> Evaluation:
    """Problems [first, last) of the five."""
    correct, tokens = CORRECT[first:last], TOKENS[first:last]
    right = int(correct.sum())
    return Evaluation(
        correct=correct,
        valid=tokens > 300,
        parallel=tokens > 600,
        num_tokens=tokens,
        critical_path=tokens // 2,
        reasons={"eos": right, "length": correct.size - right},
        outcomes={"cut": Share(correct.size - right, correct.size)},
        seconds=float(last - first),
    )


def test_rounds_join_to_the_whole() -> None:
    rounds = [part(0, 2), part(2, 4), part(4, 5)]
    back = [Evaluation.from_record(json.loads(json.dumps(one.to_record()))) for one in rounds]
    joined, whole = Evaluation.joined(back), part(0, 5)
    for name, kind in ARRAYS.items():
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
        assert getattr(joined, name).dtype == kind
    assert joined.outcomes == whole.outcomes and joined.reasons == whole.reasons
    assert joined.figures() == whole.figures()
    assert joined.figures()["accuracy"] == pytest.approx(CORRECT.mean())
    assert joined.tokens_per_second == pytest.approx(TOKENS.sum() / 5)


def test_what_is_left_begins_behind_the_finished_rounds_whatever_the_new_size() -> None:
    entries = [{"mode": "parallel", **part(0, 2).to_record()}, {"mode": "parallel", **part(2, 3).to_record()}]
    finished = Finished(Path("progress.jsonl"), entries)
    five = tuple(
        EncodedProblem(Problem(name, "question", "answer"), row, np.zeros(1, np.int32))
        for row, name in enumerate("abcde")
    )
    left = [
        (now.mode, now.first, "".join(prompt.problem.problem_id for prompt in now.prompts))
        for now in finished.left({"parallel": five, "unforced": five}, 4)
    ]
    assert left == [("parallel", 3, "de"), ("unforced", 0, "abcd"), ("unforced", 4, "e")]
    assert finished.num_rollouts == 9


def test_whole_modes_of_an_earlier_version_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"progress\.jsonl holds whole modes.*--run\.overwrite true"):
        Finished(Path("progress.jsonl"), [{"mode": "parallel", "figures": {}}])
