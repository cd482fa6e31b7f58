"""How a full matrix is cut over ranks: which of its rectangles lies where in a rank's local, row-major shard."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cut(Enum):
    """The rule by which ranks divide a full weight [rows, columns]."""

    REPLICATED = "replicated"
    ROWS = "rows"  # Megatron's column-parallel linear: output rows, dim 0
    COLUMNS = "columns"  # Megatron's row-parallel linear: input columns, dim 1
    GATE_UP = "gate_up"  # rows of gate and rows of up, each cut; the shard stacks [gate; up]
    VOCABULARY = "vocabulary"  # rows, padded at the end so that every rank holds equally many
    KV_GROUPS = (
        "kv_groups"  # fused QKV over more ranks than KV heads: each takes some queries and a KV head's copy
    )


@dataclass(frozen=True)
class Piece:
    """Rectangle [row, row + rows) x [column, column + columns) of the full weight; its first element lies at `offset`
    of the shard, its rows `stride` apart."""

    row: int
    rows: int
    column: int
    columns: int
    offset: int
    stride: int


@dataclass(frozen=True)
class Matrix:
    """A full weight: its shape (vectors have one column), and for fused QKV the rows of queries and of one head."""

    rows: int
    columns: int
    kv_groups: int = 0
    head_dim: int = 0


def local_size(matrix: Matrix, cut: Cut, size: int) -> int:
    """Elements of a rank's shard, the padding of a vocabulary included."""
    if cut is Cut.REPLICATED:
        return matrix.rows * matrix.columns
    if cut is Cut.VOCABULARY:
        return -(-matrix.rows // size) * matrix.columns
    if cut is Cut.KV_GROUPS:
        return _queries(matrix, size) * matrix.columns + 2 * matrix.head_dim * matrix.columns
    return matrix.rows * matrix.columns // size


def local_shape(matrix: Matrix, cut: Cut, size: int) -> tuple[int, ...]:
    """Shape of a rank's shard; a vector stays one."""
    count = local_size(matrix, cut, size)
    if matrix.columns == 1:
        return (count,)
    width = matrix.columns // size if cut is Cut.COLUMNS else matrix.columns
    return (count // width, width)


def pieces(matrix: Matrix, cut: Cut, rank: int, size: int) -> list[Piece]:
    """The full weight's rectangles in the shard of `rank`; the padding of a vocabulary is in none."""
    rows, columns = matrix.rows, matrix.columns
    if cut is Cut.REPLICATED:
        return [Piece(0, rows, 0, columns, 0, columns)]
    if cut is Cut.ROWS:
        count = rows // size
        return [Piece(rank * count, count, 0, columns, 0, columns)]
    if cut is Cut.COLUMNS:
        width = columns // size
        return [Piece(0, rows, rank * width, width, 0, width)]
    if cut is Cut.GATE_UP:
        half, count = rows // 2, rows // 2 // size
        return [
            Piece(part * half + rank * count, count, 0, columns, part * count * columns, columns)
            for part in range(2)
        ]
    if cut is Cut.VOCABULARY:
        count = -(-rows // size)
        held = min(count, rows - rank * count)
        return [Piece(rank * count, held, 0, columns, 0, columns)] if held > 0 else []
    return _kv_group_pieces(matrix, rank, size)


def _queries(matrix: Matrix, size: int) -> int:
    """Rows of queries on one of `size` ranks, more than there are KV heads."""
    group_rows = matrix.rows // matrix.kv_groups
    return (group_rows - 2 * matrix.head_dim) * matrix.kv_groups // size


def _kv_group_pieces(matrix: Matrix, rank: int, size: int) -> list[Piece]:
    """Full rows are [q.. k v] a KV group; ranks_per_group ranks share the queries of one and each hold its k and v."""
    group_rows, ranks_per_group = matrix.rows // matrix.kv_groups, size // matrix.kv_groups
    group, part = divmod(rank, ranks_per_group)
    queries, start = _queries(matrix, size), group * group_rows
    keys = start + group_rows - 2 * matrix.head_dim
    columns = matrix.columns
    return [
        Piece(start + part * queries, queries, 0, columns, 0, columns),
        Piece(keys, 2 * matrix.head_dim, 0, columns, queries * columns, columns),
    ]
