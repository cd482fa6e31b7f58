from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest

from megatron_npr.monitoring.statistics import (
    mean_pass_at_k,
    mean_with_interval,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize(("n", "c", "k"), [(8, 0, 8), (8, 8, 1), (8, 3, 1), (8, 3, 4), (16, 5, 8), (5, 2, 4)])
def test_pass_at_k_is_the_closed_form(n: int, c: int, k: int) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    correct = [1, 0, 0, 1, 0, 0]
    choices = list(combinations(correct, 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(any(choice) for choice in choices) / len(choices))


def test_pass_at_1_is_the_accuracy() -> None:
    correct = np.random.default_rng(0).random((20, 8)) < 0.4
    assert mean_pass_at_k(correct, 1) == pytest.approx(correct.mean())


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_the_interval_is_that_of_the_normal_approximation_for_many_problems() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, (400, 4))
    estimate = mean_with_interval(values)
    half = 1.96 * values.mean(axis=1).std() / sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_samples_of_one_problem_are_not_independent_evidence() -> None:
    once = np.random.default_rng(2).random((50, 1)) < 0.5
    one, repeated = mean_with_interval(once), mean_with_interval(np.repeat(once, 8, axis=1))
    assert (one.low, one.high) == (repeated.low, repeated.high)


def test_the_interval_covers_the_truth_95_times_of_100() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        estimate = mean_with_interval(rng.random((60, 2)) < 0.4, seed=trial, num_resamples=500)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.99


def test_the_p_value_of_few_problems_is_exact() -> None:
    assert paired_difference([1.0] * 5, [0.0] * 5).p_value == 2 / 2**5
    assert paired_difference([1.0, 1.0, 0.0], [0.0, 0.0, 1.0]).p_value == 1.0
    assert paired_difference([3.0, 0.0], [0.0, 1.0]).p_value == 1.0


def test_the_sampled_p_value_agrees_with_the_normal_one() -> None:
    rng = np.random.default_rng(4)
    difference = rng.normal(0.1, 1.0, 400)
    z = difference.mean() / sqrt((difference**2).mean() / 400)
    from statistics import NormalDist

    expected = 2 * (1 - NormalDist().cdf(abs(z)))
    assert paired_difference(difference, np.zeros(400)).p_value == pytest.approx(expected, abs=0.01)


def test_equal_models_differ_by_nothing() -> None:
    same = np.random.default_rng(5).random((30, 4)) < 0.5
    result = paired_difference(same, same)
    assert (result.delta, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_pairing_is_tighter_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(6)
    difficulty = rng.random((200, 1))
    a, b = rng.random((200, 4)) < difficulty, rng.random((200, 4)) < difficulty
    paired, alone = paired_difference(a, b), mean_with_interval(a)
    assert paired.high - paired.low < 1.4 * (alone.high - alone.low)


def test_a_result_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(7).random((40, 2))
    assert mean_with_interval(values, seed=1) == mean_with_interval(values, seed=1)
    assert mean_with_interval(values, seed=1) != mean_with_interval(values, seed=2)


def test_unpaired_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="3 against 2"):
        paired_difference([1, 2, 3], [1, 2])
