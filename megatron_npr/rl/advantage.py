"""Advantages of the two RL stages: rewards and groups in, one number a rollout out. Pure numpy, float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Advantages:
    """`values` [n], one a rollout in input order; flat groups carried no signal; `skip`: no gradient at all."""

    values: Floats
    num_groups: int
    num_flat_groups: int
    num_single_groups: int
    skip: bool


def flat_groups(rewards: Floats, groups: Ints) -> Bools:
    """Whether the rewards of a rollout's group are all equal, so that the group teaches nothing; bool [n], one a rollout.

    Decided by the extremes: sixteen rewards of -1.4 have a float standard deviation of 2e-16, not 0.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    num_groups = int(inverse.max(initial=-1)) + 1
    lowest, highest = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(lowest, inverse, rewards)
    np.maximum.at(highest, inverse, rewards)
    return np.asarray(lowest == highest)[inverse]


def _group_means(rewards: Floats, groups: Ints) -> tuple[Floats, Ints, Ints]:
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=rewards) / counts
    return means, inverse, counts


def papo_advantages(rewards: Floats, groups: Ints, *, epsilon: float = 1e-6) -> Advantages:
    """A = (r - mean of its prompt's survivors) / (unbiased std over ALL survivors + epsilon), computed once.

    rewards [n], groups [n] (prompt of each surviving rollout). Flat groups, those of one survivor among them, get 0; where
    all are flat the step is skipped.
    Source: PAPO, arXiv 2512.07461, section 3.4; unlike the published code the std is not recomputed while overwriting.
    """
    means, inverse, counts = _group_means(rewards, groups)
    std = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
    return _advantages(
        (rewards - means[inverse]) / (std + epsilon), flat_groups(rewards, groups), inverse, counts
    )


def grpo_advantages(rewards: Floats, groups: Ints, *, epsilon: float = 1e-6) -> Advantages:
    """A = (r - group mean) / (unbiased group std + epsilon); flat groups get 0 (DAPO drops them)."""
    means, inverse, counts = _group_means(rewards, groups)
    centred = rewards - means[inverse]
    squares = np.bincount(inverse, weights=centred**2)
    std = np.sqrt(squares / np.maximum(counts - 1, 1))
    return _advantages(centred / (std[inverse] + epsilon), flat_groups(rewards, groups), inverse, counts)


def _advantages(values: Floats, flat: Bools, inverse: Ints, counts: Ints) -> Advantages:
    return Advantages(
        np.where(flat, 0.0, values),
        num_groups=len(counts),
        num_flat_groups=len(np.unique(inverse[flat])),
        num_single_groups=int((counts == 1).sum()),
        skip=bool(flat.all()),
    )
