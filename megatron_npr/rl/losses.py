"""The three objectives as pure mathematics: per-token tensors in, a SUM over tokens out.

The caller divides by the number of trained tokens of the global batch (Megatron's `calculate_per_token_loss`), so a loss
never depends on how tokens fall into micro-batches, pipeline stages or data-parallel ranks.

Shape legend: M trained tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """Sum of a loss over tokens (scalar, differentiable) and sums of its metrics (detached scalars)."""

    total: Tensor
    metrics: dict[str, Tensor]


def with_entropy(loss: LossSum, entropy_M: Tensor, coefficient: float) -> LossSum:
    """The loss less `coefficient` x entropy [M], summed over tokens as the rest (verl's token mean); its sum is one
    of the metrics."""
    metrics = loss.metrics | {"entropy": entropy_M.detach().sum()}
    if coefficient == 0:
        return replace(loss, metrics=metrics)
    return LossSum(loss.total - coefficient * entropy_M.sum(), metrics)


def sft_loss(log_probs_M: Tensor) -> LossSum:
    """Negative log-likelihood, summed over tokens."""
    return LossSum(-log_probs_M.sum(), {"nll": -log_probs_M.detach().sum()})


def papo_loss(log_probs_M: Tensor, advantages_M: Tensor) -> LossSum:
    """PAPO (arXiv 2512.07461): - sum pi / sg[pi] * A, strictly on-policy, no clipping, no importance sampling.

    The ratio is one in value and carries the policy gradient: d/dtheta = - sum A * d log pi / dtheta.
    """
    ratio_M = torch.exp(log_probs_M - log_probs_M.detach())
    return LossSum(-(ratio_M * advantages_M).sum(), {"nll": -log_probs_M.detach().sum()})


def dapo_loss(
    log_probs_M: Tensor,
    old_log_probs_M: Tensor,
    advantages_M: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> LossSum:
    """DAPO (arXiv 2503.14476, equation 8): token-level clipped surrogate with decoupled bounds, and dual clip.

    ratio = pi / pi_old; loss = max(-A ratio, -A clip(ratio, 1 - low, 1 + high)); where A < 0 at most -A * dual_clip.
    """
    log_ratio_M = log_probs_M - old_log_probs_M
    ratio_M = torch.exp(log_ratio_M)
    clipped_M = ratio_M.clamp(1 - clip_low, 1 + clip_high)
    surrogate_M = torch.maximum(-advantages_M * ratio_M, -advantages_M * clipped_M)
    bounded_M = torch.where(
        advantages_M < 0, torch.minimum(surrogate_M, -advantages_M * dual_clip), surrogate_M
    )
    with torch.no_grad():
        metrics = {
            "nll": -log_probs_M.sum(),
            "clipped": (ratio_M != clipped_M).to(log_probs_M.dtype).sum(),
            "kl_old": (ratio_M - 1 - log_ratio_M).sum(),
        }
    return LossSum(bounded_M.sum(), metrics)
