"""What one update did: sums over the tokens of rows and ranks ─► combine ─► StepReport."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_npr.rl.agreement import Agreement, is_maximum

MEAN = "mean/"
"""Before the name of a loss's metric among the sums of a step: it becomes a mean over the computed tokens."""


@dataclass(frozen=True)
class StepReport:
    """What one update did. `loss` is the mean over the trained tokens of the global batch, `metrics` are means over those of
    them that were computed (all but the idle ones); `imbalance`: attended pairs of the busiest data-parallel rank over
    their mean; `load_balance`: the loss that balances experts (1: even), mean over the layers, NaN where it is off;
    `memory_gb`: the peak; `agreement`: of the trained tokens that were sampled, before the update."""

    loss: float
    grad_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    num_rows: int
    seconds: float
    memory_gb: float
    imbalance: float
    metrics: dict[str, float]
    load_balance: float
    agreement: Agreement

    @property
    def entropy(self) -> float:
        """Mean entropy of the trained tokens' distributions, in nats; NaN where it was not asked for."""
        return self.metrics.get("entropy", math.nan)


def combine(totals: dict[str, float], part: Mapping[str, float]) -> None:
    """Take the figures of some tokens into those of others: sums, and for some names maxima."""
    for name, value in part.items():
        known = totals.get(name, 0.0)
        totals[name] = max(known, value) if is_maximum(name) else known + value
