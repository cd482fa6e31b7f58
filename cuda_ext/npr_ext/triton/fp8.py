"""Rounding to FP8 for training on a GPU, in Triton: both layouts of a matrix in one pass over it.

A tile a program; what the row-major and the transposed matrix hold are the same numbers. The interpreter runs it on a CPU, see
npr_ext.triton.paged.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # rows and columns: 128 bytes a row of either matrix, whole lines of memory
WARPS = 8


@triton.jit
def _divide(
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


def divide(x_RC: Tensor, scale: Tensor, rows_RC: Tensor | None, columns_CR: Tensor | None) -> None:
    """x / scale, rounded to the type of the matrices that are given: row-major [R, C], transposed [C, R]. Contiguous all."""
    num_rows, num_columns = x_RC.shape
    if x_RC.numel():
        grid = (triton.cdiv(num_rows, TILE), triton.cdiv(num_columns, TILE))
        _divide[grid](
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
