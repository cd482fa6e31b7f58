"""Differences of log-probs by segment, against loops over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_npr.rl.agreement import Agreement, Segment, agreement_sums, is_maximum, segments_of

TOKENS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40)


def by_hand(branch_ids: NDArray[np.int32], forced: NDArray[np.bool_]) -> list[int]:
    found, last = [], 0
    for branch, was_forced in zip(branch_ids.tolist(), forced.tolist(), strict=True):
        if was_forced:
            found.append(-1)
            continue
        if branch == last:
            found.append(Segment.TRUNK if branch == 0 else Segment.BRANCH)
        else:
            found.append(Segment.JOINED if branch == 0 else Segment.FORKED)
        last = branch
    return found


def test_forced_tokens_hide_neither_a_fork_nor_a_join() -> None:
    #                     trunk      branch 1      branch 2      trunk again
    branch_ids = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0], np.int32)
    forced = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0], np.bool_)
    T, F, B, J = Segment
    assert segments_of(branch_ids, forced).tolist() == [T, T, -1, -1, F, B, -1, -1, F, B, -1, -1, J, T]


@given(TOKENS)
def test_segments_are_those_of_a_walk_over_the_tokens(tokens: list[tuple[int, bool]]) -> None:
    branch_ids = np.array([branch for branch, _ in tokens], np.int32)
    forced = np.array([was_forced for _, was_forced in tokens], np.bool_)
    assert segments_of(branch_ids, forced).tolist() == by_hand(branch_ids, forced)


@given(
    st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.integers(-1, 3)), min_size=1, max_size=40),
    st.integers(0, 40),
)
def test_sums_of_two_parts_give_the_figures_of_the_whole(
    tokens: list[tuple[float, float, int]], cut: int
) -> None:
    ours, engines, segments = (torch.tensor(column) for column in zip(*tokens, strict=True))
    totals: dict[str, float] = {}
    for part in (slice(0, cut), slice(cut, None)):
        for name, value in agreement_sums(ours[part], engines[part], segments[part]).items():
            before = totals.get(name, 0.0)
            totals[name] = max(before, float(value)) if is_maximum(name) else before + float(value)
    found = Agreement.of(totals)
    kept = [
        (float(a) - float(b), s) for a, b, s in zip(ours, engines, segments.tolist(), strict=True) if s >= 0
    ]
    if not kept:
        assert math.isnan(found.mean) and math.isnan(found.largest)
        return
    assert found.mean == pytest.approx(sum(abs(d) for d, _ in kept) / len(kept))
    assert found.largest == pytest.approx(max(abs(d) for d, _ in kept))
    assert found.k3 == pytest.approx(sum(math.exp(d) - 1 - d for d, _ in kept) / len(kept), abs=1e-12)
    for segment, (mean, largest) in found.segments.items():
        here = [abs(d) for d, s in kept if s == segment]
        assert math.isnan(mean) if not here else mean == pytest.approx(sum(here) / len(here))
        assert math.isnan(largest) if not here else largest == pytest.approx(max(here))


def test_a_response_that_no_engine_sampled_has_no_figures() -> None:
    assert all(math.isnan(value) for value in Agreement.of({}).metrics().values())
