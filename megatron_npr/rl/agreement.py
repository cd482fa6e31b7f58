"""How far the trainer's log-probs of sampled tokens are from those of the engine, which sampled them under the same weights.

branch ids and forced flags of a rollout ─► segments_of ─► a row's targets ─► agreement_sums ─► over ranks ─► Agreement

It is 0 where both compute alike, and some 1e-6 (float32) or 1e-3 (bfloat16) where they only round differently; a wrong mask or
position shows in one segment first. Other frameworks call a mean below 0.005 healthy and one above 0.01 an alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Segment(IntEnum):
    """Where in its response a token was sampled."""

    TRUNK = 0
    FORKED = 1  # the first of a branch
    BRANCH = 2
    JOINED = 3  # the first of the trunk behind a branch


def segments_of(branch_ids: NDArray[np.int32], forced: NDArray[np.bool_]) -> NDArray[np.int8]:
    """The Segment of every token of a rollout, int8 [R]; -1 where it was forced.

    branch_ids int32 [R]: 0 for the trunk, i for branch i of its block; tokens in packed order.
    """
    segments = np.full(len(branch_ids), -1, np.int8)
    sampled = np.flatnonzero(~forced)
    branch = branch_ids[sampled]
    changes = np.diff(branch, prepend=0) != 0
    within = np.where(changes, Segment.FORKED, Segment.BRANCH)
    segments[sampled] = np.where(branch > 0, within, np.where(changes, Segment.JOINED, Segment.TRUNK))
    return segments


def agreement_sums(log_probs_M: Tensor, engine_M: Tensor, segments_M: Tensor) -> dict[str, Tensor]:
    """What Agreement is made of, of some tokens; scalars by name. `segments_M` int8 [M], -1: not compared."""
    difference_M = log_probs_M.detach().double() - engine_M.double()
    size_M = difference_M.abs()
    # k3 of Schulman's estimators of KL(engine || trainer): r - 1 - log r for r = p_trainer / p_engine.
    k3_M = torch.expm1(difference_M) - difference_M
    sums: dict[str, Tensor] = {}
    for segment in Segment:
        inside_M = segments_M == segment
        inner_M = torch.where(inside_M, size_M, 0.0)
        sums |= {
            _name(segment, "count"): inside_M.double().sum(),
            _name(segment, "sum"): inner_M.sum(),
            _name(segment, "k3"): torch.where(inside_M, k3_M, 0.0).sum(),
            _name(segment, "max"): inner_M.max() if len(inner_M) else inner_M.sum(),
        }
    return sums


def is_maximum(name: str) -> bool:
    """Whether numbers of this name are combined by their maximum, not their sum."""
    return name.startswith(_PREFIX) and name.endswith("/max")


_PREFIX = "agreement/"


def _name(segment: Segment, what: str) -> str:
    return f"{_PREFIX}{segment.name.lower()}/{what}"


@dataclass(frozen=True)
class Agreement:
    """Mean and largest |difference| of log-probs and mean k3, in nats, of a step's trained tokens; NaN where none was compared.
    `segments`: mean and largest by segment."""

    mean: float
    largest: float
    k3: float
    segments: Mapping[Segment, tuple[float, float]]

    @staticmethod
    def of(totals: Mapping[str, float]) -> Agreement:
        """From `agreement_sums`, combined over rows and ranks."""
        found = {
            segment: [totals.get(_name(segment, what), 0.0) for what in ("count", "sum", "max", "k3")]
            for segment in Segment
        }
        count, total, _, k3 = map(sum, zip(*found.values(), strict=True))
        return Agreement(
            mean=_over(total, count),
            largest=max(largest for _, _, largest, _ in found.values()) if count else math.nan,
            k3=_over(k3, count),
            segments={
                segment: (_over(total, count), largest if count else math.nan)
                for segment, (count, total, largest, _) in found.items()
            },
        )

    def metrics(self) -> dict[str, float]:
        """By the names that metrics.jsonl has."""
        values = {"mean": self.mean, "max": self.largest, "k3": self.k3}
        for segment, (mean, largest) in self.segments.items():
            values |= {f"{segment.name.lower()}/mean": mean, f"{segment.name.lower()}/max": largest}
        return {_PREFIX + name: value for name, value in values.items()}


def _over(total: float, count: float) -> float:
    return total / count if count else math.nan
