"""The weights of an architecture under Megatron's names, with the cut that trainer and engine give each.

Layer numbers and expert numbers in names are GLOBAL: `decoder.layers.17.mlp.experts.local_experts.5.linear_fc1.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.cuts import Cut, Matrix
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout


class Place(Enum):
    """Where a weight lives in the model, which decides the pipeline stages that hold it."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    EXPERT = "expert"
    LAST = "last"


@dataclass(frozen=True)
class Kind:
    """All weights of one name pattern: one a model, a layer, or a layer and expert."""

    pattern: str
    place: Place
    matrix: Matrix
    cut: Cut

    def name(self, layer: int, expert: int) -> str:
        return self.pattern.format(layer=layer, expert=expert)


@dataclass(frozen=True)
class Weight:
    """One weight: its kind, and the number of its expert (0 outside of experts)."""

    kind: Kind
    expert: int

    def trainer_cut(self, layout: TrainerLayout, rank: int) -> tuple[Cut, int, int]:
        """(cut, part, parts) of the shard that `rank` of the world holds, if its stage and expert rank do."""
        size = layout.etp if self.kind.place is Place.EXPERT else layout.tp
        return self.kind.cut, rank % layout.places % size, size

    def engine_cut(self, layout: EngineLayout, rank: int) -> tuple[Cut, int, int]:
        """(cut, part, parts) of the shard that `rank` of an engine replica holds, if its expert rank does."""
        size = layout.etp if self.kind.place is Place.EXPERT else layout.tp
        return engine_cut(self.kind, size), rank % size, size

    def engine_holds(self, num_experts: int, layout: EngineLayout, rank: int) -> bool:
        """Whether `rank` of an engine replica holds any of it."""
        if self.kind.place is not Place.EXPERT:
            return True
        return self.expert // (num_experts // layout.ep) == rank // layout.etp % layout.ep


def kinds(architecture: Architecture) -> list[Kind]:
    """Every kind of weight, with the TRAINER's cut: Megatron cuts fused QKV into equal runs of rows, also over more
    ranks than KV heads."""
    hidden, dim = architecture.hidden_size, architecture.head_dim
    vocabulary = Matrix(architecture.vocab_size, hidden)
    found = [Kind("embedding.word_embeddings.weight", Place.EMBEDDING, vocabulary, Cut.VOCABULARY)]

    def layer(suffix: str, rows: int, columns: int, cut: Cut, place: Place = Place.LAYER) -> None:
        matrix = Matrix(rows, columns)
        if ".linear_qkv.weight" in suffix or ".linear_qkv.bias" in suffix:
            matrix = Matrix(rows, columns, architecture.num_kv_heads, dim)
        found.append(Kind("decoder.layers.{layer}." + suffix, place, matrix, cut))

    layer("self_attention.linear_proj.weight", hidden, architecture.num_heads * dim, Cut.COLUMNS)
    layer("self_attention.linear_qkv.weight", architecture.qkv_rows, hidden, Cut.ROWS)
    if architecture.qkv_bias:
        layer("self_attention.linear_qkv.bias", architecture.qkv_rows, 1, Cut.ROWS)
    layer("self_attention.linear_qkv.layer_norm_weight", hidden, 1, Cut.REPLICATED)
    if architecture.qk_norm:
        layer("self_attention.q_layernorm.weight", dim, 1, Cut.REPLICATED)
        layer("self_attention.k_layernorm.weight", dim, 1, Cut.REPLICATED)
    ffn = architecture.ffn_hidden_size
    if architecture.num_experts:
        layer("pre_mlp_layernorm.weight", hidden, 1, Cut.REPLICATED)
        layer("mlp.router.weight", architecture.num_experts, hidden, Cut.REPLICATED)
        expert = "mlp.experts.local_experts.{expert}."
        layer(expert + "linear_fc1.weight", 2 * ffn, hidden, Cut.GATE_UP, Place.EXPERT)
        layer(expert + "linear_fc2.weight", hidden, ffn, Cut.COLUMNS, Place.EXPERT)
    else:
        layer("mlp.linear_fc1.weight", 2 * ffn, hidden, Cut.GATE_UP)
        layer("mlp.linear_fc1.layer_norm_weight", hidden, 1, Cut.REPLICATED)
        layer("mlp.linear_fc2.weight", hidden, ffn, Cut.COLUMNS)
    found.append(Kind("decoder.final_layernorm.weight", Place.LAST, Matrix(hidden, 1), Cut.REPLICATED))
    if not architecture.tied_embeddings:
        found.append(Kind("output_layer.weight", Place.LAST, vocabulary, Cut.VOCABULARY))
    return found


def catalog(architecture: Architecture) -> dict[str, Weight]:
    """Every weight by its name, layer by layer."""
    listed = kinds(architecture)
    named: dict[str, Weight] = {}
    for place, layers in (
        ((Place.EMBEDDING,), 1),
        ((Place.LAYER, Place.EXPERT), architecture.num_layers),
        ((Place.LAST,), 1),
    ):
        for layer in range(layers):
            for kind in (kind for kind in listed if kind.place in place):
                for expert in range(architecture.num_experts if kind.place is Place.EXPERT else 1):
                    named[kind.name(layer, expert)] = Weight(kind, expert)
    return named


def engine_cut(kind: Kind, size: int) -> Cut:
    """The ENGINE's cut over `size` ranks: more ranks than KV heads hold copies of these, for their own KV cache."""
    return Cut.KV_GROUPS if 0 < kind.matrix.kv_groups < size else kind.cut
