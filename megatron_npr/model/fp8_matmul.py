"""Matrix products in FP8: every tensor is rounded under one scale of its own (current scaling).

    x [R, C] ─► largest magnitude ─► scale ─► x / scale as e4m3 or e5m2, row-major, transposed or both ─► product

Largest magnitude / largest number of the format as in Micikevicius et al. 2022; what Transformer Engine calls current scaling
and torchao tensorwise. Zeros have scale 1. Infinities and NaNs are not looked for (the host would wait for the device): they
make every number of the product NaN, which the gradient norm shows.

The library multiplies row-major [M, K] by the transpose of row-major [N, K], and nothing else: before Blackwell the tensor
cores read FP8 along K alone. A linear layer y = x W^T therefore needs every tensor both ways: x and W for y, dy and W^T for
dx = dy W, dy^T and x^T for dW = dy^T x. The transposes are written out, a byte a number.

Shape legend: R rows and C columns of a tensor, M, N, K of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from npr_ext.ops.scaled_mm import ALIGNMENT, scaled_mm

Fp8Format = Literal["hybrid", "e4m3"]

FORWARD = torch.float8_e4m3fn
GRADIENTS: dict[Fp8Format, torch.dtype] = {"hybrid": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}
"""Types of activations and weights, and of gradients. The library has no product of two e5m2 matrices; there is none here."""

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Scaled:
    """values * scale; FP8 [R, C] and float32 []."""

    values: Tensor
    scale: Tensor


def largest_magnitude(x: Tensor) -> Tensor:
    """float32 []; 0 for no numbers. One pass, |x| is not stored."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    largest: Tensor = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    return largest


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale under which the largest magnitude becomes the largest number of the format; where that scale is no normal
    number (the tensor is zero, or as good as) it is 1."""
    scale = largest / torch.finfo(dtype).max
    return torch.where(scale < _SMALLEST, 1.0, scale)


def rounded(x_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale to the nearest, ties to even, [R, C]."""
    values_RC = torch.empty_like(x_RC, dtype=dtype, memory_format=torch.contiguous_format)
    _divide(x_RC, scale, values_RC, None)
    return values_RC


def rounded_transposed(x_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of `rounded`, [C, R]."""
    values_CR = x_RC.new_empty(x_RC.shape[1], x_RC.shape[0], dtype=dtype)
    _divide(x_RC, scale, None, values_CR)
    return values_CR


def rounded_both(x_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`rounded` and `rounded_transposed` in one pass."""
    values_RC = torch.empty_like(x_RC, dtype=dtype, memory_format=torch.contiguous_format)
    values_CR = x_RC.new_empty(x_RC.shape[1], x_RC.shape[0], dtype=dtype)
    _divide(x_RC, scale, values_RC, values_CR)
    return values_RC, values_CR


def transposed(values_RC: Tensor) -> Tensor:
    """FP8 [C, R] of [R, C]."""
    one = values_RC.new_ones((), dtype=torch.float32)
    return rounded_transposed(values_RC, one, values_RC.dtype)  # x / 1 is x


def _divide(x_RC: Tensor, scale: Tensor, rows_RC: Tensor | None, columns_CR: Tensor | None) -> None:
    """No number exceeds the format by more than the rounding of the division, so that nothing has to be clamped."""
    if x_RC.device.type == "cuda":
        from npr_ext.triton import (
            fp8 as triton_fp8,  # there wherever torch was built for CUDA, and only there
        )

        triton_fp8.divide(x_RC.contiguous(), scale, rows_RC, columns_CR)
        return
    exact_RC = x_RC.float() / scale
    if rows_RC is not None:
        rows_RC.copy_(exact_RC)
    if columns_CR is not None:
        columns_CR.copy_(exact_RC.t())


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
