"""Packing: every sample once, no row over budget, targets and predecessors as the unpacked sequence has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_npr.data.packing import TrainSample, pack_row, plan_rows, row_length
from npr_ext import BranchLayout, branch_layout
from npr_ext.errors import UserError
from npr_ext.testing import TAGS

PROMPTS = [np.arange(20, 20 + length, dtype=np.int32) for length in (1, 4, 7)]


@st.composite
def sample_lists(draw: st.DrawFn) -> list[TrainSample]:
    samples = []
    for _ in range(draw(st.integers(1, 12))):
        count = draw(st.integers(1, 20))
        ids = np.array(draw(st.lists(st.integers(2, 30), min_size=count, max_size=count)), np.int32)
        loss_mask = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        prompt = PROMPTS[draw(st.integers(0, 2))]
        samples.append(
            TrainSample(prompt, ids, loss_mask, np.arange(count, dtype=np.float32), draw(st.floats(-2, 2)))
        )
    return samples


@given(sample_lists(), st.integers(27, 80), st.booleans())
def test_every_sample_stands_in_exactly_one_row_within_the_budget(
    samples: list[TrainSample], row_tokens: int, share: bool
) -> None:
    plans = plan_rows(samples, row_tokens=row_tokens, share_prompts=share)
    placed = sorted(index for plan in plans for group in plan.groups for index in group)
    assert placed == list(range(len(samples)))
    for plan in plans:
        assert 0 < plan.num_tokens <= row_tokens
        for group in plan.groups:
            assert len({samples[index].prompt_ids.tobytes() for index in group}) == 1


@settings(max_examples=60)
@given(sample_lists(), st.booleans(), st.booleans())
def test_a_packed_row_predicts_the_tokens_that_its_samples_train(
    samples: list[TrainSample], share: bool, branching: bool
) -> None:
    plans = plan_rows(samples, row_tokens=64, share_prompts=share)
    for plan in plans:
        row = pack_row(samples, plan, length=row_length(plans), tags=TAGS, branching=branching, pad_id=0)
        predecessors = BranchLayout.from_tensor(row.layout).predecessor[row.targets].long()
        for place, before, index, within in zip(
            row.targets.tolist(),
            predecessors.tolist(),
            row.sample_of.tolist(),
            row.within.tolist(),
            strict=True,
        ):
            sample = samples[index]
            alone = alone_layout(sample, branching)
            prompt = len(sample.prompt_ids)
            whole = np.concatenate([sample.prompt_ids, sample.response_ids])
            assert row.token_ids[0, place] == sample.response_ids[within]
            assert row.token_ids[0, before] == whole[alone.predecessor[prompt + within]]
            assert row.layout[0, place] == alone.position_ids[prompt + within]
        expected = sum(
            int((samples[i].loss_mask & predicted(samples[i], branching)).sum())
            for group in plan.groups
            for i in group
        )
        assert row.num_targets == expected


def alone_layout(sample: TrainSample, branching: bool) -> BranchLayout:
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]))
    return branch_layout(ids, tags=TAGS, prompt_lengths=len(sample.prompt_ids), branching=branching)


def predicted(sample: TrainSample, branching: bool) -> NDArray[np.bool_]:
    """Which tokens of the response some token predicts, by the layout of the sample alone, [R]."""
    return alone_layout(sample, branching).predecessor.numpy()[len(sample.prompt_ids) :] >= 0


def test_a_sample_longer_than_a_row_is_the_users_mistake() -> None:
    sample = TrainSample(
        PROMPTS[1], np.arange(40, dtype=np.int32), np.ones(40, bool), np.zeros(40, np.float32)
    )
    with pytest.raises(UserError, match="44 tokens does not fit a row of 32"):
        plan_rows([sample], row_tokens=32, share_prompts=True)
