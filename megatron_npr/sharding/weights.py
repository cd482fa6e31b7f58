"""Weights as tensors: the shard that a rank holds of a full one, fused and split projections, global layer numbers.

Names are Megatron's with GLOBAL layer numbers (`decoder.layers.17.mlp.linear_fc1.weight`); sharding.catalog lists them with
their cuts. Fused QKV interleaves by KV group ([q.. k v] a group); fused gate/up stacks [gate; up] a shard.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megatron_npr.sharding.cuts import Cut, Matrix, local_shape, pieces
from npr_engine.model.transformer import ModelConfig


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding so that every tensor-parallel rank holds equally many."""
    return -(-vocab_size // tp_size) * tp_size


def shard(full: Tensor, matrix: Matrix, cut: Cut, rank: int, size: int) -> Tensor:
    """The part of a full weight that `rank` holds, contiguous; a vocabulary's padding is zero."""
    local = full.new_zeros(local_shape(matrix, cut, size))
    flat, full_RC = local.view(-1), full.reshape(matrix.rows, matrix.columns)
    for piece in pieces(matrix, cut, rank, size):
        held = flat.as_strided((piece.rows, piece.columns), (piece.stride, 1), piece.offset)
        held.copy_(full_RC[piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns])
    return local


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")


def global_name(name: str, *, first_layer: int, first_expert: int) -> str:
    """A chunk of a stage counts its layers from 0, an expert-parallel rank its experts; the same name with their numbers in
    the model. A grouped GEMM's `experts.linear_fc1.weight3` is `experts.local_experts.3.linear_fc1.weight`."""
    name = _GROUPED.sub(r".experts.local_experts.\2.\1.weight", name)
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first_expert}.", name)


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, config: ModelConfig) -> Tensor:
    """[N*H, D], [K*H, D], [K*H, D] -> [K * (N/K + 2) * H, D] interleaved by KV group; also for biases [.]."""
    groups, tail = config.num_kv_heads, query.shape[1:]
    parts = [part.reshape(groups, -1, config.head_dim, *tail) for part in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, *tail)


def split_qkv(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`."""
    groups, tail = config.num_kv_heads, fused.shape[1:]
    per_group = config.num_heads // groups
    parts = fused.reshape(groups, per_group + 2, config.head_dim, *tail).split([per_group, 1, 1], dim=1)
    query, key, value = (part.reshape(-1, *tail) for part in parts)
    return query, key, value
