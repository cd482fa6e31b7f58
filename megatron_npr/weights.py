"""Names and shards of the policy's weights: the one table that bridge, resharding and checkpoints' readers share.

Names are Megatron's with GLOBAL layer numbers (`decoder.layers.17.mlp.linear_fc1.weight`); a shard is what one
tensor-parallel rank holds. Fused QKV interleaves by KV group ([q.. k v] a group); fused gate/up stacks [gate; up] a shard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from npr_engine.model import ModelConfig


class Partition(Enum):
    """How tensor parallelism cuts a full weight."""

    REPLICATED = "replicated"
    COLUMN = "column"  # output rows, dim 0
    ROW = "row"  # input columns, dim 1
    GATE_UP = "gate_up"  # dim 0 of gate and of up separately
    VOCABULARY = "vocabulary"  # dim 0, padded to a multiple of the tensor size


_PARTITION = {
    "word_embeddings.weight": Partition.VOCABULARY,
    "output_layer.weight": Partition.VOCABULARY,
    "linear_qkv.weight": Partition.COLUMN,
    "linear_qkv.bias": Partition.COLUMN,
    "linear_proj.weight": Partition.ROW,
    "linear_fc1.weight": Partition.GATE_UP,
    "linear_fc2.weight": Partition.ROW,
}


def partition_of(name: str) -> Partition:
    """The cut of a weight, by the end of its name; norms are replicated."""
    return next((cut for end, cut in _PARTITION.items() if name.endswith(end)), Partition.REPLICATED)


def layer_weight_names(config: ModelConfig, layer: int) -> list[str]:
    """Names of one layer's weights, in Megatron's order."""
    prefix = f"decoder.layers.{layer}."
    names = ["self_attention.linear_proj.weight"]
    names += ["self_attention.linear_qkv.weight"]
    names += ["self_attention.linear_qkv.bias"] if config.qkv_bias else []
    names += ["self_attention.linear_qkv.layer_norm_weight"]
    if config.qk_norm:
        names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    names += ["mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc2.weight"]
    return [prefix + name for name in names]


def weight_names(config: ModelConfig) -> list[str]:
    """Names of all weights of the model."""
    names = ["embedding.word_embeddings.weight"]
    for layer in range(config.num_layers):
        names += layer_weight_names(config, layer)
    names.append("decoder.final_layernorm.weight")
    return names if config.tied_embeddings else [*names, "output_layer.weight"]


def padded_vocabulary(vocab_size: int, tensor_size: int) -> int:
    """Rows of the embedding so that every tensor-parallel rank holds equally many."""
    return -(-vocab_size // tensor_size) * tensor_size


def shard(full: Tensor, cut: Partition, rank: int, size: int) -> Tensor:
    """This rank's part of a full weight (a view where memory allows; vocabulary padded with zero rows)."""
    if cut is Partition.REPLICATED or (size == 1 and cut is not Partition.VOCABULARY):
        return full
    if cut is Partition.ROW:
        return full.chunk(size, dim=1)[rank]
    if cut is Partition.GATE_UP:
        gate, up = full.chunk(2, dim=0)
        return torch.cat((gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]))
    if cut is Partition.VOCABULARY:
        missing = padded_vocabulary(full.shape[0], size) - full.shape[0]
        if missing:
            full = torch.cat((full, full.new_zeros(missing, full.shape[1])))
    return full.chunk(size, dim=0)[rank]


def unshard(shards: Sequence[Tensor], cut: Partition, vocab_size: int) -> Tensor:
    """The full weight from the shards of all ranks; inverse of `shard`."""
    if cut is Partition.REPLICATED:
        return shards[0]
    if cut is Partition.ROW:
        return torch.cat(list(shards), dim=1)
    if cut is Partition.GATE_UP:
        halves = [part.chunk(2, dim=0) for part in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    full = torch.cat(list(shards), dim=0)
    return full[:vocab_size] if cut is Partition.VOCABULARY else full


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def with_layer_offset(name: str, offset: int) -> str:
    """A pipeline stage counts its layers from 0; the same name with its global layer number."""
    return _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + offset}.", name)


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


def full_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of a full weight."""
    heads, groups, dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    qkv = (heads + 2 * groups) * dim
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (config.vocab_size, hidden),
        "output_layer.weight": (config.vocab_size, hidden),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (hidden, heads * dim),
        "linear_fc1.weight": (2 * config.ffn_hidden_size, hidden),
        "linear_fc2.weight": (hidden, config.ffn_hidden_size),
        "q_layernorm.weight": (dim,),
        "k_layernorm.weight": (dim,),
    }
    return next((shape for end, shape in shapes.items() if name.endswith(end)), (hidden,))


def shard_shape(name: str, config: ModelConfig, tensor_size: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel rank's shard."""
    cut, shape = partition_of(name), list(full_shape(name, config))
    if cut is Partition.VOCABULARY:
        shape[0] = padded_vocabulary(shape[0], tensor_size)
    if cut is not Partition.REPLICATED:
        shape[1 if cut is Partition.ROW else 0] //= tensor_size
    return tuple(shape)
