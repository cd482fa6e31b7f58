"""A group whose rewards are all equal teaches nothing and leaves no trace, whatever floats its rewards are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.config import DapoSettings, Stage1Config
from megatron_npr.data.packing import TrainSample
from megatron_npr.data.sft_encoding import encode_response
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from megatron_npr.monitoring.statistics import mean_with_interval, paired_difference
from megatron_npr.report.charts import curves, stacked_bar
from megatron_npr.rl.advantage import flat_groups, grpo_advantages, papo_advantages
from megatron_npr.rl.losses import dapo_loss
from megatron_npr.rl.rewards import format_reward
from megatron_npr.rl.verifier import Verdict
from megatron_npr.rollout.scoring import Scored
from megatron_npr.stages.stage1 import overlong, reward, split_updates
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.rollout import Rollout
from npr_ext.layout.violations import Violation

OVERLONG = -float(Fraction(100, 4096))
NOT_REPRESENTABLE = (-1.4, -0.4, 0.1, -0.6, 1 / 3, OVERLONG, 0.9755859375, -1e-3, 1e3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("value", [*NOT_REPRESENTABLE, 0.0, 1.0, -1.0])
def test_equal_rewards_are_a_flat_group_of_advantage_zero(value: float, size: int) -> None:
    rewards = np.array([*[value] * size, 1.0, -1.0, 0.5])
    groups = np.array([*[7] * size, 3, 3, 3])
    assert flat_groups(rewards, groups).tolist() == [True] * size + [False] * 3
    for advantages in (papo_advantages(rewards, groups), grpo_advantages(rewards, groups)):
        assert advantages.values[:size].tolist() == [0.0] * size
        assert (advantages.num_groups, advantages.num_flat_groups) == (2, 1)
        assert not advantages.skip
        alone = papo_advantages(rewards[:size], groups[:size])
        assert alone.skip and not alone.values.any()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1.4, -0.4, 0.1])), max_size=30))
def test_a_group_is_flat_where_it_has_one_reward(batch: list[tuple[int, float]]) -> None:
    found = {group: {r for g, r in batch if g == group} for group, _ in batch}
    groups = np.array([group for group, _ in batch], np.int64)
    flat = flat_groups(np.array([value for _, value in batch]), groups)
    assert flat.tolist() == [len(found[group]) == 1 for group, _ in batch]


def test_rewards_that_differ_by_little_are_no_flat_group() -> None:
    values = np.array([0.1, 0.1 + 1e-6, 0.1, 0.1])
    advantages = grpo_advantages(values, np.zeros(4, int))
    assert advantages.num_flat_groups == 0 and advantages.values[1] > 0


def scored(group: int, num_tokens: int, form: float) -> Scored:
    """A response of stage 1 that is wrong, of one token and its prompt."""
    ids = np.array([num_tokens % 50, 1], np.int32)
    rollout = Rollout(
        request_id=f"{group}",
        prompt_ids=np.array([1], np.int32),
        token_ids=ids,
        logprobs=np.full(2, -1.0, np.float32),
        sampler_logprobs=np.full(2, -1.0, np.float32),
        forced=np.zeros(2, np.bool_),
        branch_ids=np.zeros(2, np.int32),
        decode_steps=np.arange(2, dtype=np.int32),
        positions=np.arange(1, 3, dtype=np.int32),
        finish_reason="eos",
        branching=False,
        constrained=False,
        weights_version=0,
    )
    return Scored(rollout, group, Violation.NO_BLOCK, form, Verdict.WRONG)


def stage1_config(*, dynamic_sampling: bool = True) -> Stage1Config:
    return Stage1Config.model_validate(
        {
            "run": {"dir": Path("unused")},
            "model": {"path": Path("unused")},
            "data": {"train": "unused"},
            "dapo": {"dynamic_sampling": dynamic_sampling},
            "train": {"updates_per_step": 1},
        }
    )


def gradient(samples: Sequence[TrainSample]) -> torch.Tensor:
    """Gradient of DAPO's token mean for logits over 50 tokens, float64 [50]."""
    logits = torch.linspace(-1, 1, 50, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([token for sample in samples for token in sample.response_ids])
    advantages = torch.tensor([sample.advantage for sample in samples for _ in sample.response_ids])
    log_probs = logits.log_softmax(-1)[ids]
    loss = dapo_loss(log_probs, log_probs.detach(), advantages, clip_low=0.2, clip_high=0.28, dual_clip=10)
    (loss.total / len(ids)).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("value", NOT_REPRESENTABLE)
def test_a_flat_group_leaves_no_trace_in_the_gradient_of_stage_1(value: float) -> None:
    config = stage1_config()
    telling = [scored(0, 3 + index, 0.0) for index in range(16)]
    rewards = np.where(np.arange(16) % 3 == 0, 1.0, -1.0)
    flat = [scored(1, 20 + index, value) for index in range(16)]
    ((alone,), (beside,)) = (
        split_updates(items, np.array([*rewards, *[value] * (len(items) - 16)]), config)
        for items in (telling, telling + flat)
    )
    assert torch.equal(gradient(alone), gradient(beside))


def test_flat_groups_alone_give_no_update() -> None:
    items = [scored(index // 16, index, -1.4) for index in range(64)]
    assert split_updates(items, np.full(64, -1.4), stage1_config()) == []
    kept = split_updates(items, np.full(64, -1.4), stage1_config(dynamic_sampling=False))
    assert [sample.advantage for update in kept for sample in update] == [0.0] * 64


@given(
    st.lists(st.sampled_from([-4, -2]), max_size=5),
    st.integers(0, 5000),
    st.sampled_from([0, 1, 3, 512, 4096]),
)
def test_a_reward_is_its_exact_sum_rounded_once(tenths: list[int], num_tokens: int, buffer: int) -> None:
    config: Any = SimpleNamespace(
        rollout=SimpleNamespace(max_tokens=4500), dapo=DapoSettings(overlong_buffer=buffer)
    )
    item: Any = SimpleNamespace(
        format=max(-2.0, sum(tenths) / 10),
        accuracy_reward=-1.0,
        rollout=SimpleNamespace(num_tokens=num_tokens),
    )
    excess = Fraction(num_tokens - (4500 - buffer), buffer or 1)
    punished = -min(max(excess, Fraction(0)), Fraction(1)) if buffer else Fraction(0)
    exact = max(Fraction(-2), Fraction(sum(tenths), 10)) + (punished if tenths else punished - 1)
    assert reward(cast(Scored, item), config) == float(exact)
    assert overlong(num_tokens, 4500, config.dapo) == punished


@pytest.mark.parametrize("num_gaps, tenths", [(0, -4), (1, -6), (3, -10)])
def test_format_rewards_of_as_many_tenths_are_one_float(num_gaps: int, tenths: int) -> None:
    grammar = Grammar(Vocabulary.from_tokenizer(demo_tokenizer()))
    steps = "".join(
        f"{'so' if index < num_gaps else ''}<step>\n{index + 1}: the width is 3\n</step>\n"
        for index in range(4)
    )
    plans = "".join(f"<plan>{index + 1}: find it</plan>\n" for index in range(4))
    block = f"<guideline>\nso\n{plans}</guideline>\n{steps}<takeaway>\nmultiply them\n</takeaway>\n"
    ids = encode_response(f"{block}\\boxed{{3}}", grammar.vocabulary)
    assert format_reward(grammar, ids) == tenths / 10


@pytest.mark.parametrize("value", NOT_REPRESENTABLE)
@pytest.mark.parametrize("samples", [1, 3, 7, 10])
def test_statistics_of_constant_data_are_that_constant(value: float, samples: int) -> None:
    estimate = mean_with_interval(np.full((9, samples), value))
    assert (estimate.value, estimate.low, estimate.high) == (value, value, value)
    found = paired_difference(np.full((9, samples), value), np.full((9, 4), value))
    assert (found.delta, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_the_order_of_samples_is_no_difference_between_models() -> None:
    values = np.random.default_rng(0).random((50, 16))
    assert paired_difference(values, values[:, ::-1]).p_value == 1.0


def test_a_curve_that_is_constant_but_for_rounding_is_drawn_as_constant() -> None:
    flat, noisy = (
        curves([{"step": step, "loss": 0.1 + step * noise} for step in range(3)]) for noise in (0.0, 1e-17)
    )
    assert flat == noisy
    assert "0%" in stacked_bar({"train": 0.0})
