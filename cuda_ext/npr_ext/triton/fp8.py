"""Rounding to FP8 on a GPU, in Triton: what npr_ext.ops.fp8 and the engine call for CUDA tensors.

    quantize        one scale a matrix (training): row-major, transposed or both in one pass, a tile a program
    quantize_rows   a scale a row (the engine's activations): amax, scale and values in one launch, a row a program

Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npr_ext.triton.warps import warps_of_row

TILE = 128  # rows and columns: 128 bytes a row of either matrix, whole lines of memory
WARPS = 8


@triton.jit
def _quantize(
    x_RC,
    scale,
    rows_RC,
    columns_CR,
    num_rows,
    num_columns,
    tile: tl.constexpr,
    writes_rows: tl.constexpr,
    writes_columns: tl.constexpr,
):
    row = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    column = (tl.program_id(1) * tile + tl.arange(0, tile)).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = row[:, None] * num_columns + column[None, :]
    x = tl.load(x_RC + at, mask=inside, other=0.0).to(tl.float32) / tl.load(scale)
    if writes_rows:
        tl.store(rows_RC + at, x.to(rows_RC.dtype.element_ty), mask=inside)
    if writes_columns:
        turned = column[:, None] * num_rows + row[None, :]
        values = tl.trans(x.to(columns_CR.dtype.element_ty))
        tl.store(columns_CR + turned, values, mask=tl.trans(inside))


def quantize(x_RC: Tensor, scale: Tensor, rows_RC: Tensor | None, columns_CR: Tensor | None) -> None:
    """Writes x / scale, rounded to their type, to the matrices that are given: row-major [R, C], transposed
    [C, R]. All are contiguous; `scale` is float32 []."""
    num_rows, num_columns = x_RC.shape
    if x_RC.numel():
        grid = (triton.cdiv(num_rows, TILE), triton.cdiv(num_columns, TILE))
        _quantize[grid](
            x_RC,
            scale,
            rows_RC,
            columns_CR,
            num_rows,
            num_columns,
            tile=TILE,
            writes_rows=rows_RC is not None,
            writes_columns=columns_CR is not None,
            num_warps=WARPS,
        )


@triton.jit
def _quantize_rows(x_RC, values_RC, scales_R, format_max, smallest, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    there = i < width
    x = tl.load(x_RC + row * width + i, mask=there, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / format_max
    scale = tl.where(scale < smallest, 1.0, scale)
    scaled = tl.minimum(tl.maximum(x / scale, -format_max), format_max)
    tl.store(values_RC + row * width + i, scaled.to(values_RC.dtype.element_ty), mask=there)
    tl.store(scales_R + row, scale)


def quantize_rows(x_RC: Tensor, dtype: torch.dtype, format_max: float) -> tuple[Tensor, Tensor]:
    """(values of `dtype` [R, C], float32 scales [R]): x = values * scales, the amax of a row becomes `format_max`.
    What `row_amax`, `scale_of` and `quantize` of npr_ext.ops.fp8 do one after the other, in one launch."""
    x_RC = x_RC.contiguous()
    num_rows, width = x_RC.shape
    values_RC = torch.empty_like(x_RC, dtype=dtype)
    scales_R = torch.empty(num_rows, dtype=torch.float32, device=x_RC.device)
    if num_rows:
        _quantize_rows[(num_rows,)](
            x_RC,
            values_RC,
            scales_R,
            format_max,
            torch.finfo(torch.float32).tiny,
            width=width,
            block=triton.next_power_of_2(width),
            num_warps=warps_of_row(width),
        )
    return values_RC, scales_R
