"""Fused operations on lists of tensors: `lists` holds one list for each operand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


def multi_tensor_scale(chunk: int, flag: Tensor, lists: Lists, scale: float) -> None:
    """(sources, targets): each source times `scale`."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk: int, flag: Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm over all tensors of the one list [1], and of each of them."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms


def multi_tensor_adam(
    chunk: int,
    flag: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    decay: float,
) -> None:
    """A step of Adam (mode 1: decoupled decay) of (gradients, weights, moments, second moments, and fp32 master weights where
    the weights are of less precision)."""
    gradients, weights, firsts, seconds, *masters = lists
    unbias1, unbias2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, weight, first, second, master in zip(
        gradients, weights, firsts, seconds, masters[0] if masters else weights, strict=True
    ):
        current, slope = master.float(), gradient.float()
        if mode == 0:
            slope = slope + decay * current
        first.mul_(beta1).add_(slope, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
        update = (first / unbias1) / ((second / unbias2).sqrt() + epsilon)
        if mode == 1:
            update = update + decay * current
        master.copy_(current - lr * update)
        weight.copy_(master)
