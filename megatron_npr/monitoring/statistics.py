"""What a difference in accuracy is worth: intervals over problems, paired tests, unbiased pass@k.

Problems are the unit of chance (the samples of one problem hang together): they are resampled, and flipped.
Shape suffixes: P problems, S samples of a problem, B resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 10_000
CHUNK = 1_000  # resamples drawn at a time: B x P numbers in memory, not all at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over the same problems: 95 % bootstrap interval and two-sided sign-flip p-value."""

    delta: float
    low: float
    high: float
    p_value: float


def mean_with_interval(
    values_PS: ArrayLike, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Mean over problems and samples with the interval over problems.

    Args:
        values_PS: [P, S] (or [P], already averaged over samples).
    """
    means_P = _problem_means(values_PS)
    low, high = _interval(means_P, seed, num_resamples)
    return Estimate(_mean(means_P), low, high)


def paired_difference(
    a_PS: ArrayLike, b_PS: ArrayLike, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> PairedDifference:
    """Compare two models on the same problems in the same order; numbers of samples may differ."""
    a_P, b_P = _problem_means(a_PS), _problem_means(b_PS)
    if len(a_P) != len(b_P):
        raise ValueError(f"paired problems: {len(a_P)} against {len(b_P)}")
    difference_P = a_P - b_P
    low, high = _interval(difference_P, seed, num_resamples)
    p_value = _sign_flip_p_value(difference_P, seed + 1, num_resamples)
    return PairedDifference(_mean(difference_P), low, high, p_value)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased probability that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct in {num_samples} samples")
    wrong = num_samples - num_correct
    if wrong < k:
        return 1.0
    # C(n-c, k) / C(n, k), without large factorials
    none_right = np.prod(1.0 - k / np.arange(wrong + 1, num_samples + 1))
    return float(1.0 - none_right)


def mean_pass_at_k(correct_PS: ArrayLike, k: int) -> float:
    """pass@k averaged over problems, [P, S] of booleans."""
    correct = np.asarray(correct_PS, dtype=bool)
    return float(np.mean([pass_at_k(correct.shape[1], int(row.sum()), k) for row in correct]))


def _problem_means(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"values of shape {array.shape}: expected [problems, samples] or [problems], not empty"
        )
    return array if array.ndim == 1 else np.array([_mean(row) for row in array])


def _mean(values: NDArray[np.float64]) -> float:
    """The mean, whatever the order of the values, and that of equal ones exactly: a difference of the last bit would count
    as one of the models."""
    return float(np.clip(math.fsum(values) / len(values), values.min(), values.max()))


def _interval(values_P: NDArray[np.float64], seed: int, num_resamples: int) -> tuple[float, float]:
    rng, num = np.random.default_rng(seed), len(values_P)
    means = [
        rng.multinomial(num, np.full(num, 1 / num), size=size) @ values_P / num
        for size in _chunks(num_resamples)
    ]
    resampled = np.concatenate(means).clip(values_P.min(), values_P.max())  # a mean lies between its values
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def _sign_flip_p_value(difference_P: NDArray[np.float64], seed: int, num_resamples: int) -> float:
    """Under the null hypothesis every problem's sign is a coin; all combinations where there are few."""
    changed = difference_P[difference_P != 0]
    observed = abs(changed.sum()) * (1 - 1e-12)  # ties count, whatever the order of summation
    if 2 ** len(changed) <= num_resamples:
        every = (np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1
        return float(np.mean(np.abs((1 - 2 * every) @ changed) >= observed))
    rng = np.random.default_rng(seed)
    extreme = sum(
        int(np.sum(np.abs((1 - 2 * rng.integers(0, 2, (size, len(changed)))) @ changed) >= observed))
        for size in _chunks(num_resamples)
    )
    return (extreme + 1) / (num_resamples + 1)


def _chunks(total: int) -> list[int]:
    return [min(CHUNK, total - start) for start in range(0, total, CHUNK)]
