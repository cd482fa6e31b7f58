"""Traces of real rollouts are accepted, doctored ones are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npr_engine.engine import Engine
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.testing import PIECES
from npr_engine.trace import examine, ran_in_parallel, write_chrome_trace
from tests.unit.engine.conftest import PROMPTS


@pytest.fixture
def rollout(new_engine: Callable[..., Engine]) -> Rollout:
    """A greedy response with two blocks."""
    return new_engine().generate(PROMPTS[:1], SamplingParams(max_tokens=300, temperature=0.0))[0]


def with_steps(rollout: Rollout, index: np.ndarray | int, steps: np.ndarray | int) -> Rollout:
    """The rollout with other decode steps at some tokens."""
    doctored = rollout.decode_steps.copy()
    doctored[index] = steps
    return replace(rollout, decode_steps=doctored)


def test_a_real_trace_is_sound_and_without_a_wasted_step(rollout: Rollout) -> None:
    execution = examine(rollout)
    assert execution.faults == () and ran_in_parallel(rollout)
    assert execution.blocks == execution.parallel_blocks == 2
    assert execution.parallel_efficiency == 1.0 and execution.concurrency > 1.2
    assert execution.sampled == int((~rollout.forced).sum())


@pytest.mark.parametrize("sizes", [{"num_kv_slots": 336, "block_size": 4, "max_batch_tokens": 24}])
def test_siblings_stay_concurrent_under_pressure(
    sizes: dict[str, int], new_engine: Callable[..., Engine]
) -> None:
    engine = new_engine(**sizes)
    rollouts = engine.generate(PROMPTS * 3, SamplingParams(max_tokens=300, temperature=0.0))
    assert engine.stats().preemptions > 0
    assert all(ran_in_parallel(rollout) for rollout in rollouts)


def test_sequential_decoding_is_not_parallel(rollout: Rollout, new_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=300, temperature=0.0, branching=False)
    assert not ran_in_parallel(new_engine().generate(PROMPTS[:1], params)[0])
    one_after_another = with_steps(rollout, np.arange(rollout.num_tokens), np.arange(rollout.num_tokens))
    execution = examine(one_after_another)
    assert execution.parallel_blocks == 0
    assert len(execution.faults) == 5  # three branches, then two
    assert all("none of them together with a sibling" in fault for fault in execution.faults)
    assert not ran_in_parallel(one_after_another)


def test_a_doctored_trace_is_rejected(rollout: Rollout) -> None:
    inside = np.flatnonzero(rollout.branch_ids == 2)
    fork, join = int((rollout.branch_ids > 0).argmax()) - 1, int(inside[-1])
    doctored = {
        "a branch before its fork": with_steps(rollout, inside[0], rollout.decode_steps[fork]),
        "two tokens of a branch at once": with_steps(rollout, inside[-1], rollout.decode_steps[inside[-2]]),
        "a branch that ends after the join": with_steps(rollout, join, int(rollout.decode_steps.max())),
        "a token before the last one": with_steps(rollout, 5, int(rollout.decode_steps[3])),
        "branches out of order": replace(
            rollout, branch_ids=np.where(rollout.branch_ids == 1, 3, rollout.branch_ids).astype(np.int32)
        ),
    }
    for what, trace in doctored.items():
        assert examine(trace).faults, what
        assert not ran_in_parallel(trace)


def test_the_chrome_trace_has_a_slice_for_each_step_of_each_branch(rollout: Rollout, tmp_path: Path) -> None:
    write_chrome_trace(tmp_path / "trace.json", [rollout], piece=PIECES.__getitem__)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert sum(event["args"]["tokens"] for event in slices) == rollout.num_tokens
    assert {event["tid"] for event in slices} == {0, 1, 2, 3}
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["trunk", "branch 1", "branch 2", "branch 3"]
    assert any(event["name"] == "\n<step>\n1:a" or "<step>" in event["name"] for event in slices)
