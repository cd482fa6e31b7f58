"""Hugging Face's names and shapes of the weights that Megatron holds fused.

decoder.layers.3.self_attention.linear_qkv.weight ──► model.layers.3.self_attn.q_proj.weight, k_proj, v_proj
"""

from __future__ import annotations

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.catalog import catalog

_DIRECT = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER_DIRECT = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_LAYER_FUSED = {
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
_EXPERTS = "mlp.experts.local_experts."
_EXPERT_PARTS = {"linear_fc1.weight": ("gate_proj", "up_proj"), "linear_fc2.weight": ("down_proj",)}


def huggingface_names(name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that make up one Megatron weight."""
    if name in _DIRECT:
        return (_DIRECT[name],)
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    if rest.startswith(_EXPERTS):
        expert, projection = rest.removeprefix(_EXPERTS).split(".", 1)
        at = f"model.layers.{layer}.mlp.experts.{expert}."
        return tuple(f"{at}{part}.weight" for part in _EXPERT_PARTS[projection])
    parts = _LAYER_FUSED.get(rest) or (_LAYER_DIRECT[rest],)
    return tuple(f"model.layers.{layer}.{part}" for part in parts)


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The tensors of a Hugging Face folder of this architecture with their shapes, layer by layer."""
    found: dict[str, tuple[int, ...]] = {}
    for name, weight in catalog(architecture).items():
        parts, matrix = huggingface_names(name), weight.kind.matrix
        for part, rows in zip(parts, _part_rows(len(parts), matrix.rows, architecture), strict=True):
            found[part] = (rows,) if matrix.columns == 1 else (rows, matrix.columns)
    return found


def _part_rows(parts: int, rows: int, architecture: Architecture) -> tuple[int, ...]:
    """Rows of each part of a fused weight: queries, keys and values; gate and up; or the whole."""
    if parts == 3:
        key_rows = architecture.num_kv_heads * architecture.head_dim
        return architecture.num_heads * architecture.head_dim, key_rows, key_rows
    return (rows // parts,) * parts
