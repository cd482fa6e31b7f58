"""RMSNorm and its gradient. Shape legend: T rows, D columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fakes.te_on_cpu.dtypes import torch_dtype
from tests.fakes.te_on_cpu.quantise import quantize


def rmsnorm_fwd(
    x_TD: Tensor,
    weight_D: Tensor,
    epsilon: float,
    out: Any,
    quantizer: Any,
    dtype: int,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """(normed, and rounded where there is a quantiser; no mean; inverse of the root mean square [T])."""
    assert not zero_centered and out is None, "not written: nobody asked"
    inverse_T = torch.rsqrt(x_TD.float().pow(2).mean(-1) + epsilon)
    normed = (x_TD.float() * inverse_T[:, None] * weight_D.float()).to(torch_dtype(dtype))
    return (normed if quantizer is None else quantize(normed, quantizer)), None, inverse_T


def rmsnorm_bwd(
    gradient_TD: Tensor,
    x_TD: Tensor,
    inverse_T: Tensor,
    weight_D: Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input [T, D] and of the weight [D]."""
    assert not zero_centered, "not written: nobody asked"
    unit = x_TD.float() * inverse_T[:, None]
    scaled = gradient_TD.float() * weight_D.float()
    of_input = inverse_T[:, None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    of_weight = (gradient_TD.float() * unit).sum(0)
    return of_input.to(x_TD.dtype), of_weight.to(weight_D.dtype)
