"""Rounding to FP8: values = x / scale to the nearest, ties to even; scale = amax / largest number of the format.

    x ─► amax (of all numbers, or of each row) ─► scale_of ─► quantize: e4m3 or e5m2, row-major, transposed or both

As in Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433); Transformer Engine calls it current
scaling. The engine has a scale a row (vLLM: per token, per channel), training one a matrix. Infinities and
NaNs are not looked for (the host would wait for the device): they make the numbers under their scale NaN.

R rows and C columns of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = torch.finfo(torch.float32).tiny


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of all numbers, float32 []; 0 for no numbers. One pass, |x| is not stored."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    largest: Tensor = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    return largest


def row_amax(x_RC: Tensor) -> Tensor:
    """Largest magnitude of each row, float32 [R]; that of a row in pieces is the largest of theirs."""
    return x_RC.abs().amax(1).float()


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale under which the largest magnitude becomes the largest number of the format, in the shape of
    `amax`; where that scale is no normal number (all are zero, or as good as) it is 1."""
    scale = amax / torch.finfo(dtype).max
    return torch.where(scale < _SMALLEST, 1.0, scale)


def quantize(x_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale as `dtype`, [R, C]; the scale is float32 [] or [R]. No number exceeds the format by more than
    the rounding of the division, so that nothing has to be clamped."""
    if scale.dim():
        return (x_RC.float() / scale[:, None]).to(dtype)
    values_RC = torch.empty_like(x_RC, dtype=dtype, memory_format=torch.contiguous_format)
    _write(x_RC, scale, values_RC, None)
    return values_RC


def quantize_rows(x_RC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values [R, C], float32 scales [R]), a scale a row; a row of zeros has scale 1."""
    scales_R = scale_of(row_amax(x_RC), dtype)
    return quantize(x_RC, scales_R, dtype), scales_R


def quantize_transposed(x_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of `quantize` under one scale, [C, R]."""
    values_CR = x_RC.new_empty(x_RC.shape[1], x_RC.shape[0], dtype=dtype)
    _write(x_RC, scale, None, values_CR)
    return values_CR


def quantize_both(x_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize` and `quantize_transposed` in one pass."""
    values_RC = torch.empty_like(x_RC, dtype=dtype, memory_format=torch.contiguous_format)
    values_CR = x_RC.new_empty(x_RC.shape[1], x_RC.shape[0], dtype=dtype)
    _write(x_RC, scale, values_RC, values_CR)
    return values_RC, values_CR


def transposed(values_RC: Tensor) -> Tensor:
    """FP8 [C, R] of [R, C], contiguous."""
    one = values_RC.new_ones((), dtype=torch.float32)
    return quantize_transposed(values_RC, one, values_RC.dtype)  # x / 1 is x


def _write(x_RC: Tensor, scale: Tensor, rows_RC: Tensor | None, columns_CR: Tensor | None) -> None:
    """x / scale to the matrices that are given, row-major and transposed."""
    if x_RC.device.type == "cuda":
        # Triton is there wherever torch was built for CUDA, and only there.
        from npr_ext.triton import fp8 as kernels

        kernels.quantize(x_RC.contiguous(), scale, rows_RC, columns_CR)
        return
    exact_RC = x_RC.float() / scale
    if rows_RC is not None:
        rows_RC.copy_(exact_RC)
    if columns_CR is not None:
        columns_CR.copy_(exact_RC.t())
