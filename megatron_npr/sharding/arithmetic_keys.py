"""Keys of config.json that change a model's arithmetic, and the values at which they do not.

A model of ours computes RMSNorm, RoPE on whole heads, grouped-query attention over all earlier tokens, SwiGLU. Keys that are
not listed here or read elsewhere say nothing of the arithmetic (transformers ignores them for these models).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npr_ext.errors import UserError

_NONE: tuple[Any, ...] = (None, False)
_ONE: tuple[Any, ...] = (None, 1)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # activations and biases
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "attention_bias": _NONE,  # also of the output projection
    "attention_out_bias": _NONE,
    "mlp_bias": _NONE,
    "use_bias": _NONE,
    # which tokens are seen
    "use_sliding_window": _NONE,
    "attention_chunk_size": (None, 0),
    "is_causal": (None, True),
    "use_bidirectional_attention": _NONE,
    "is_encoder_decoder": _NONE,
    "add_cross_attention": _NONE,
    # positions
    "position_embedding_type": (None, "rope", "rotary"),
    "alibi": _NONE,
    "rope_interleaved": _NONE,
    "rotary_pct": _ONE,
    "rotary_dim": (None,),
    "rope_local_base_freq": (None,),
    "use_mrope": _NONE,
    "mrope_section": (None,),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "use_dynamic_ntk": _NONE,
    "use_logn_attn": _NONE,
    # scales and limits of scores, logits and residuals
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_attn_by_inverse_layer_idx": _NONE,
    "attn_temperature_tuning": (None, False, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "scale_emb": _ONE,
    "use_attention_sinks": _NONE,
    # experts
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "scoring_func": (None, "softmax"),
    "routed_scaling_factor": _ONE,
    "n_group": _ONE,
    "topk_group": _ONE,
}


def check_arithmetic(
    config: Mapping[str, Any], where: str, *, qk_norm: bool, qkv_bias: bool, experts: bool
) -> None:
    """UserError, which names the key, where a setting asks for arithmetic that ours does not have."""
    of_family = {"qk_norm": qk_norm, "use_qk_norm": qk_norm, "qk_layernorm": qk_norm, "qkv_bias": qkv_bias}
    neutral = _NEUTRAL | {key: (None, value) for key, value in of_family.items()}
    for key, allowed in neutral.items():
        if key in config and config[key] not in allowed:
            known = next((value for value in allowed if value is not None), None)
            raise UserError(f"{where}: {key} {config[key]!r} is not supported, only {known!r}")
    other = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    if other:
        raise UserError(f"{where}: layer_types {other[0]!r} is not supported, only 'full_attention'")
    if experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise UserError(f"{where}: layers without experts among layers with them are not supported")
