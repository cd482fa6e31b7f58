"""Matrix products in FP8: every tensor is rounded under one scale of its own (npr_ext.ops.fp8).

The library multiplies row-major [M, K] by the transpose of row-major [N, K], and nothing else: before Blackwell the tensor
cores read FP8 along K alone. A linear layer y = x W^T therefore needs every tensor both ways: x and W for y, dy and W^T for
dx = dy W, dy^T and x^T for dW = dy^T x. The transposes are written out, a byte a number. Infinities and NaNs make every
number of a product NaN, which the gradient norm shows.

Shape legend: R rows and C columns of a tensor, M, N, K of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from npr_ext.ops.fp8 import E4M3, E5M2
from npr_ext.ops.scaled_mm import ALIGNMENT, scaled_mm

Fp8Format = Literal["hybrid", "e4m3"]

FORWARD = E4M3
GRADIENTS: dict[Fp8Format, torch.dtype] = {"hybrid": E5M2, "e4m3": E4M3}
"""Types of activations and weights, and of gradients. The library has no product of two e5m2 matrices; there is none here."""


@dataclass(frozen=True)
class Scaled:
    """values * scale; FP8 [R, C] and float32 []."""

    values: Tensor
    scale: Tensor


def product(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """a b^T in bf16 or float32, [M, N] from [M, K] and [N, K].

    `fast` leaves sums to the tensor cores (some 14 bits on Hopper): fit for a forward pass, too coarse for gradients, as
    Transformer Engine and torchao have it. Without it partial sums are added up in float32.
    """
    num_rows, num_columns = len(a.values), len(b.values)
    if not num_rows or not num_columns or not a.values.shape[1]:
        return a.values.new_zeros(num_rows, num_columns, dtype=dtype)
    left, right = _padded(a.values, rows=False), _padded(b.values, rows=True).t()
    result = scaled_mm(left, right, a.scale, b.scale, dtype, fast=fast)
    return result[:, :num_columns].contiguous()


def _padded(values_RC: Tensor, *, rows: bool) -> Tensor:
    """With zeros up to the alignment; the tensor itself where it has it."""
    more_rows, more_columns = (-count % ALIGNMENT for count in values_RC.shape)
    if not more_columns and not (rows and more_rows):
        return values_RC
    # As bytes: torch pads no FP8, and the byte 0 is the number 0.
    padded = functional.pad(values_RC.view(torch.uint8), (0, more_columns, 0, more_rows if rows else 0))
    return padded.view(values_RC.dtype)
