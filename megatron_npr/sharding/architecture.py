"""The shape of a model, dense or mixture of experts, as numbers: what planners need, without a tensor and without torch.

config.json or a known name ──► Architecture ──► parameter counts, weight-sync plans, memory plans
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_npr.sharding.arithmetic_keys import check_arithmetic
from megatron_npr.sharding.model_files import read_object
from megatron_npr.sharding.rope_settings import read_rope
from npr_engine.model.architecture import Architecture as Architecture
from npr_engine.model.architecture import ModelConfig
from npr_ext.errors import UserError


def _qwen3(
    layers: int, hidden: int, heads: int, ffn: int, *, kv: int = 8, tied: bool = False, experts: int = 0
) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=128,
        ffn_hidden_size=ffn,
        vocab_size=151_936,
        tied_embeddings=tied,
        num_experts=experts,
        experts_per_token=8 if experts else 0,
    )


def _smollm2(layers: int, hidden: int, heads: int, kv: int, ffn: int) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=64,
        ffn_hidden_size=ffn,
        vocab_size=49_152,
        qk_norm=False,
        tied_embeddings=True,
    )


KNOWN = {
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12_288),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17_408),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25_600),
    "Qwen3-30B-A3B": _qwen3(48, 2048, 32, 768, kv=4, experts=128),
    "Qwen3-235B-A22B": _qwen3(94, 4096, 64, 1536, kv=4, experts=128),
    "SmolLM2-135M": _smollm2(30, 576, 9, 3, 1536),
    "SmolLM2-360M": _smollm2(32, 960, 15, 5, 2560),
    "SmolLM2-1.7B": _smollm2(24, 2048, 32, 32, 8192),
}
"""Published shapes, from the config.json of each model."""

_FAMILIES = {  # model_type: (norm of queries and keys, bias of queries, keys and values, experts)
    "qwen3": (True, False, False),
    "qwen3_moe": (True, False, True),
    "qwen2": (False, True, False),
    "llama": (False, False, False),
}


def from_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """From the contents of a Hugging Face config.json; UserError names `where` and what is not supported."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; known: {', '.join(_FAMILIES)}")
    qk_norm, qkv_bias, experts = _FAMILIES[family]
    check_arithmetic(config, where, qk_norm=qk_norm, qkv_bias=qkv_bias, experts=experts)
    theta, scaling = read_rope(config, where)
    keys = _Keys(config, where)
    heads, hidden = keys.count("num_attention_heads"), keys.count("hidden_size")
    return ModelConfig(
        num_layers=keys.count("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=keys.count("num_key_value_heads", heads if family == "llama" else None),
        head_dim=keys.count("head_dim", 128 if family == "qwen3" else hidden // heads),
        ffn_hidden_size=keys.count("moe_intermediate_size" if experts else "intermediate_size"),
        vocab_size=keys.count("vocab_size"),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        # transformers writes the count under its own name, Qwen's files carry the other one
        num_experts=keys.count("num_experts" if "num_experts" in config else "num_local_experts")
        if experts
        else 0,
        experts_per_token=keys.count("num_experts_per_tok") if experts else 0,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=keys.number("rms_norm_eps"),
        norm_topk_prob=keys.flag("norm_topk_prob") if experts else True,
    )


class _Keys:
    """Values of a config.json by key; UserError names a key that is missing or of another kind. null is not given."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        return int(self._value(key, default, "a positive integer", lambda v: type(v) is int and v > 0))

    def number(self, key: str) -> float:
        """A number that is not negative."""
        return float(self._value(key, None, "a number", lambda v: type(v) in (int, float) and v >= 0))

    def flag(self, key: str) -> bool:
        """true or false; false where it is not given."""
        return bool(self._value(key, False, "true or false", lambda v: type(v) is bool))

    def _value(self, key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self._where}: key {key!r} is missing")
        if not fits(value):
            raise UserError(f"{self._where}: {key} is {value!r}, expected {expected}")
        return value


def find_architecture(model: str) -> Architecture:
    """A folder, a config.json, or a known name in any case: the owner, a suffix such as -Instruct-2507, or the folders of
    a run may stand around it."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return from_config(read_object(path), str(path)).shape
    for part in reversed(Path(model).parts):  # a folder that is yet to be made: runs/qwen3-4b/stage2/model
        word = part.lower()
        fitting = [name for name in KNOWN if word == name.lower() or word.startswith(name.lower() + "-")]
        if fitting:
            return KNOWN[max(fitting, key=len)]
    raise UserError(f"{model}: neither a config.json nor a known model ({', '.join(KNOWN)})")
