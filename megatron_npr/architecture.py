"""The shape of a model, dense or mixture of experts, as numbers: what planners need, without a tensor and without torch.

config.json or a known name ──► Architecture ──► parameter counts, resharding plans, memory plans
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npr_ext.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """RMSNorm, grouped-query attention, SwiGLU; `num_experts` 0 is a dense model, otherwise every layer routes.

    `ffn_hidden_size` is that of the MLP of a dense layer, or of ONE expert.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    qk_norm: bool = True
    qkv_bias: bool = False
    tied_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}"
            )

    @property
    def qkv_rows(self) -> int:
        """Output rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer, the norms of queries and keys and the norm before them included."""
        weights = (self.qkv_rows + self.num_heads * self.head_dim) * self.hidden_size
        bias = self.qkv_rows if self.qkv_bias else 0
        return weights + bias + self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def expert_parameters(self) -> int:
        """Of one expert, or of the MLP of a dense layer."""
        return 3 * self.ffn_hidden_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Of one layer: attention, the norm before the MLP, router, all experts."""
        router = self.num_experts * self.hidden_size
        experts = max(self.num_experts, 1) * self.expert_parameters
        return self.attention_parameters + self.hidden_size + router + experts

    @property
    def embedding_parameters(self) -> int:
        """Of one vocabulary matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Of the whole model; a tied vocabulary matrix counts once."""
        matrices = 1 if self.tied_embeddings else 2
        return (
            self.num_layers * self.layer_parameters + matrices * self.embedding_parameters + self.hidden_size
        )

    @property
    def active_parameters(self) -> int:
        """Those a token meets in matrix products: all but the input embedding and the experts not chosen."""
        chosen = self.experts_per_token if self.num_experts else 1
        layer = self.attention_parameters + self.hidden_size + self.num_experts * self.hidden_size
        return (
            self.num_layers * (layer + chosen * self.expert_parameters)
            + self.embedding_parameters
            + self.hidden_size
        )


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

_FAMILIES = {  # model_type: (norm of queries and keys, bias of q, k, v, experts)
    "qwen3": (True, False, False),
    "qwen3_moe": (True, False, True),
    "qwen2": (False, True, False),
    "llama": (False, False, False),
}


def from_config(config: Mapping[str, Any], where: str) -> Architecture:
    """From the contents of a Hugging Face config.json; UserError names `where` and what is not supported."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; known: {', '.join(_FAMILIES)}")
    qk_norm, qkv_bias, experts = _FAMILIES[family]
    if experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise UserError(f"{where}: layers without experts among layers with them are not supported")
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_hidden_size=config["moe_intermediate_size" if experts else "intermediate_size"],
            vocab_size=config["vocab_size"],
            qk_norm=qk_norm,
            qkv_bias=qkv_bias or bool(config.get("attention_bias", False)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            # transformers writes the count under its own name, Qwen's files carry the other one
            num_experts=config.get("num_experts", config.get("num_local_experts", 0)) if experts else 0,
            experts_per_token=config["num_experts_per_tok"] if experts else 0,
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error.args[0]!r} is missing") from None


def find_architecture(model: str) -> Architecture:
    """A folder, a config.json, or a known name in any case: the owner, a suffix such as -Instruct-2507, or the folders of
    a run may stand around it."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            return from_config(json.loads(path.read_text()), str(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    for part in reversed(Path(model).parts):  # a folder that is yet to be made: runs/qwen3-4b/stage2/model
        word = part.lower()
        fitting = [name for name in KNOWN if word == name.lower() or word.startswith(name.lower() + "-")]
        if fitting:
            return KNOWN[max(fitting, key=len)]
    raise UserError(f"{model}: neither a config.json nor a known model ({', '.join(KNOWN)})")
