"""Advantages of the two RL stages: rewards and groups in, one number a rollout out. Pure numpy, float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Advantages:
    """`values` [n], one a rollout in input order; `flat` groups carried no signal; `skip`: no gradient at all."""

    values: Floats
    num_groups: int
    num_flat_groups: int
    num_single_groups: int
    skip: bool


def _group_means(rewards: Floats, groups: Ints) -> tuple[Floats, Ints, Ints]:
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=rewards) / counts
    return means, inverse, counts


def papo_advantages(rewards: Floats, groups: Ints, *, epsilon: float = 1e-6) -> Advantages:
    """A = (r - mean of its prompt's survivors) / (unbiased std over ALL survivors + epsilon), computed once.

    rewards [n], groups [n] (prompt of each surviving rollout). A group of one survivor gets 0. Zero std: skip the step.
    Source: PAPO, arXiv 2512.07461, section 3.4; unlike the published code the std is not recomputed while overwriting.
    """
    if len(rewards) < 2:
        return Advantages(np.zeros(len(rewards)), len(rewards), len(rewards), len(rewards), skip=True)
    means, inverse, counts = _group_means(rewards, groups)
    std = float(np.std(rewards, ddof=1))
    values = (rewards - means[inverse]) / (std + epsilon)
    flat = _count_flat(values, inverse, len(counts))
    return Advantages(
        values, len(counts), flat, int((counts == 1).sum()), skip=std == 0.0 or flat == len(counts)
    )


def grpo_advantages(rewards: Floats, groups: Ints, *, epsilon: float = 1e-6) -> Advantages:
    """A = (r - group mean) / (unbiased group std + epsilon); groups of zero variance get 0 (DAPO drops them)."""
    means, inverse, counts = _group_means(rewards, groups)
    centred = rewards - means[inverse]
    squares = np.bincount(inverse, weights=centred**2)
    std = np.sqrt(squares / np.maximum(counts - 1, 1))
    values = np.where(std[inverse] > 0, centred / (std[inverse] + epsilon), 0.0)
    flat = _count_flat(values, inverse, len(counts))
    return Advantages(values, len(counts), flat, int((counts == 1).sum()), skip=flat == len(counts))


def _count_flat(values: Floats, inverse: Ints, num_groups: int) -> int:
    largest = np.zeros(num_groups)
    np.maximum.at(largest, inverse, np.abs(values))
    return int((largest < 1e-12).sum())
