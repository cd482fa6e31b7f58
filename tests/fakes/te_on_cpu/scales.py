"""Scales of FP8 numbers: what a tensor is multiplied with before it is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.fakes.te_on_cpu.dtypes import torch_dtype

_FP32_MAX = torch.finfo(torch.float32).max


def scale_of(amax: Tensor, dtype: int, *, epsilon: float = 0.0, power_of_2: bool = False) -> Tensor:
    """fp32 scales under which the largest absolute values `amax` just fit; 1 where there is nothing to scale."""
    return _scale(amax.float().clamp_min(epsilon), torch.finfo(torch_dtype(dtype)).max, power_of_2)


def _scale(amax: Tensor, largest: float, power_of_2: bool) -> Tensor:
    scale = (largest / amax).clamp_max(_FP32_MAX)
    scale = torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def compute_amax(tensor: Tensor, out: Tensor) -> None:
    """The largest absolute value into `out`, one number."""
    out.copy_(tensor.detach().float().abs().amax().reshape(out.shape))


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int,
    flag: Tensor,
    lists: Sequence[Sequence[Tensor]],
    largest: float,
    power_of_2: bool,
    epsilon: float,
) -> None:
    """Scales and their inverses of each largest value: lists (amaxes, scales, inverses)."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax.clamp_min(epsilon), largest, power_of_2))
        inverse.copy_(1 / scale)


def fused_amax_and_scale_update_after_reduction(
    amax: Tensor,
    histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    algorithm: str,
    dtype: int,
    margin: float,
) -> None:
    """Delayed scaling's step: `amax` holds the newest largest values of all quantisers in a row, histories [length, q] are
    moved on by one (their first row is free for the next pass), scales [q] follow from them."""
    counts = [history.shape[1] for history in histories]
    for newest, history, scale in zip(torch.split(amax, counts), histories, scales, strict=True):
        history[0] = newest
        largest = history.amax(0) if algorithm == "max" else newest
        known = (largest > 0) & largest.isfinite()
        scale.copy_(torch.where(known, scale_of(largest, dtype) / 2**margin, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0
