"""Advantages against numpy one-liners and the properties that the published code breaks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.rl.advantage import grpo_advantages, papo_advantages

BATCHES = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1.0, 1.0])), min_size=2, max_size=40)


@given(BATCHES)
def test_papo_advantage_equals_the_one_liner(batch: list[tuple[int, float]]) -> None:
    groups = np.array([group for group, _ in batch])
    rewards = np.array([reward for _, reward in batch])
    expected = [
        (r - rewards[groups == g].mean()) / (rewards.std(ddof=1) + 1e-6)
        for g, r in zip(groups, rewards, strict=True)
    ]
    np.testing.assert_allclose(papo_advantages(rewards, groups).values, expected, atol=1e-12)


@given(BATCHES)
def test_grpo_advantage_equals_the_one_liner(batch: list[tuple[int, float]]) -> None:
    groups = np.array([group for group, _ in batch])
    rewards = np.array([reward for _, reward in batch])
    for g, r, value in zip(groups, rewards, grpo_advantages(rewards, groups).values, strict=True):
        member = rewards[groups == g]
        std = member.std(ddof=1) if len(member) > 1 else 0.0
        assert abs(value - ((r - member.mean()) / (std + 1e-6) if std > 0 else 0.0)) < 1e-9


def test_a_group_of_one_survivor_has_advantage_zero_and_is_counted() -> None:
    result = papo_advantages(np.array([1.0, 1.0, -1.0]), np.array([0, 1, 1]))
    assert result.values[0] == 0.0
    assert result.num_single_groups == 1


def test_equal_rewards_skip_the_step() -> None:
    assert papo_advantages(np.ones(4), np.array([0, 0, 1, 1])).skip
    assert papo_advantages(np.array([]), np.array([], dtype=int)).skip
    assert not papo_advantages(np.array([1.0, -1.0]), np.array([0, 0])).skip


def test_advantages_do_not_shrink_with_rising_accuracy() -> None:
    # The published code recomputes the std while overwriting the rewards: advantages fall to 0.65-0.75 of these.
    rewards = np.where(np.arange(320) % 20 == 0, -1.0, 1.0)
    groups = np.arange(320) // 16
    values = papo_advantages(rewards, groups).values
    centred = rewards - np.repeat(rewards.reshape(20, 16).mean(1), 16)
    np.testing.assert_allclose(values * (np.std(rewards, ddof=1) + 1e-6), centred, atol=1e-12)
