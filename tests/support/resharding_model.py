"""Brute force for resharding: full weights whose elements are numbered, cut head by head and expert by expert."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout

Labels = NDArray[np.int64]
PADDING = -1


class Model:
    """Full weights whose elements are numbered through the whole model, and how heads and halves make them up."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = a = architecture
        self._next = 0
        self.full: dict[str, Labels] = {
            "embedding.word_embeddings.weight": self.new(a.vocab_size, a.hidden_size)
        }
        self.parts: dict[str, tuple[Labels, ...]] = {}  # heads of q, k, v [heads, H, D], or (gate, up)
        self.rows_cut: set[str] = set()
        for layer in range(a.num_layers):
            at = f"decoder.layers.{layer}."
            self.full[at + "self_attention.linear_proj.weight"] = self.new(
                a.hidden_size, a.num_heads * a.head_dim
            )
            self.qkv(at + "self_attention.linear_qkv.weight", a.hidden_size)
            if a.qkv_bias:
                self.qkv(at + "self_attention.linear_qkv.bias", 1)
            self.full[at + "self_attention.linear_qkv.layer_norm_weight"] = self.new(a.hidden_size)
            if a.qk_norm:
                self.full[at + "self_attention.q_layernorm.weight"] = self.new(a.head_dim)
                self.full[at + "self_attention.k_layernorm.weight"] = self.new(a.head_dim)
            if a.num_experts:
                self.full[at + "pre_mlp_layernorm.weight"] = self.new(a.hidden_size)
                self.full[at + "mlp.router.weight"] = self.new(a.num_experts, a.hidden_size)
                for expert in range(a.num_experts):
                    self.mlp(at + f"mlp.experts.local_experts.{expert}.")
            else:
                self.mlp(at + "mlp.")
                self.full[at + "mlp.linear_fc1.layer_norm_weight"] = self.new(a.hidden_size)
        self.full["decoder.final_layernorm.weight"] = self.new(a.hidden_size)
        if not a.tied_embeddings:
            self.full["output_layer.weight"] = self.new(a.vocab_size, a.hidden_size)

    def new(self, *shape: int) -> Labels:
        count = math.prod(shape)
        self._next += count
        return np.arange(self._next - count, self._next).reshape(shape)

    def qkv(self, name: str, columns: int) -> None:
        a = self.architecture
        counts = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
        self.parts[name] = tuple(self.new(count, a.head_dim, columns) for count in counts)

    def mlp(self, prefix: str) -> None:
        a = self.architecture
        self.parts[prefix + "linear_fc1.weight"] = (
            self.new(a.ffn_hidden_size, a.hidden_size),
            self.new(a.ffn_hidden_size, a.hidden_size),
        )
        self.full[prefix + "linear_fc2.weight"] = self.new(a.hidden_size, a.ffn_hidden_size)

    def names(self) -> set[str]:
        return {*self.full, *self.parts}

    def shard(self, name: str, rank: int, size: int, *, engine: bool) -> Labels:
        """Flat shard of `rank`, put together head by head."""
        if "linear_qkv.weight" in name or "linear_qkv.bias" in name:
            q, k, v = self.parts[name]
            if engine and size > len(k):  # own queries, and a copy of the KV head that they attend to
                queries = len(q) // size
                own = rank * len(k) // size
                return np.concatenate(
                    [q[rank * queries : (rank + 1) * queries].ravel(), k[own].ravel(), v[own].ravel()]
                )
            per_group = len(q) // len(k)
            heads = [
                head
                for group in range(len(k))
                for head in (*q[group * per_group : (group + 1) * per_group], k[group], v[group])
            ]
            return np.concatenate(heads).reshape(size, -1)[rank]
        if name in self.parts:
            return np.concatenate([half.reshape(size, -1)[rank] for half in self.parts[name]])
        full = self.full[name]
        if "embedding" in name or "output" in name:
            missing = -len(full) % size
            padded = np.concatenate([full, np.full((missing, full.shape[1]), PADDING)])
            return padded.reshape(size, -1)[rank]
        if "linear_proj" in name or "linear_fc2" in name:
            return np.split(full, size, axis=1)[rank].ravel()
        return full.ravel()


def expert_of(name: str) -> int | None:
    return int(name.split("local_experts.")[1].split(".")[0]) if "local_experts" in name else None


def trainer_shards(model: Model, layout: TrainerLayout) -> list[dict[str, Labels]]:
    """What every rank of the world holds, by walking Megatron's grid axis by axis."""
    pp_of_layer = {}
    layer = 0
    for chunk in range(len(layout.layers) // layout.pp):
        for stage in range(layout.pp):
            for _ in range(layout.layers[chunk * layout.pp + stage]):
                pp_of_layer[layer] = stage
                layer += 1
    world: list[dict[str, Labels]] = []
    for stage in range(layout.pp):
        dense_grid = [tp for _ in range(layout.dp_cp) for tp in range(layout.tp)]
        copies = layout.tp * layout.dp_cp // (layout.ep * layout.etp)
        expert_grid = [
            (ep, etp) for _ in range(copies) for ep in range(layout.ep) for etp in range(layout.etp)
        ]
        for tp, (ep, etp) in zip(dense_grid, expert_grid, strict=True):
            held = {}
            for name in model.names():
                if name.startswith("embedding"):
                    wanted = stage == 0
                elif "layers" in name:
                    wanted = pp_of_layer[int(name.split(".")[2])] == stage
                else:
                    wanted = stage == layout.pp - 1
                expert = expert_of(name)
                if expert is not None:
                    wanted = wanted and expert // (model.architecture.num_experts // layout.ep) == ep
                if wanted:
                    rank, size = (tp, layout.tp) if expert is None else (etp, layout.etp)
                    held[name] = model.shard(name, rank, size, engine=False)
            world.append(held)
    return world


def engine_shards(model: Model, layout: EngineLayout) -> list[dict[str, Labels]]:
    replica = []
    for rank in range(layout.size):
        held = {}
        for name in model.names():
            expert = expert_of(name)
            if expert is None:
                held[name] = model.shard(name, rank % layout.tp, layout.tp, engine=True)
            elif expert // (model.architecture.num_experts // layout.ep) == rank // layout.etp % layout.ep:
                held[name] = model.shard(name, rank % layout.etp, layout.etp, engine=True)
        replica.append(held)
    return replica


DENSE = Architecture(
    num_layers=4,
    hidden_size=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=2,
    ffn_hidden_size=8,
    vocab_size=13,
    qkv_bias=True,
    tied_embeddings=True,
)
MOE = Architecture(
    num_layers=5,
    hidden_size=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=2,
    ffn_hidden_size=4,
    vocab_size=11,
    num_experts=4,
    experts_per_token=2,
)
