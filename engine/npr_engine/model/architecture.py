"""The shape of a model, dense or mixture of experts, as numbers: what planners need, without a tensor and
without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from npr_ext.errors import UserError

PROJECTIONS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
"""Ends of the names of the weights that become FP8 in training, engine and export; norms, biases, routers and
vocabularies stay."""


def is_projection(name: str) -> bool:
    """Whether the weight of that name (Megatron's, or its pattern) is a projection, which becomes FP8."""
    return name.endswith(PROJECTIONS)


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
        """Parameters of one layer's attention, the norms of queries and keys and the norm before them included."""
        weights = (self.qkv_rows + self.num_heads * self.head_dim) * self.hidden_size
        bias = self.qkv_rows if self.qkv_bias else 0
        return weights + bias + self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, or of the MLP of a dense layer."""
        return 3 * self.ffn_hidden_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, the norm before the MLP, router, all experts."""
        router = self.num_experts * self.hidden_size
        experts = max(self.num_experts, 1) * self.expert_parameters
        return self.attention_parameters + self.hidden_size + router + experts

    @property
    def embedding_parameters(self) -> int:
        """Parameters of one vocabulary matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied vocabulary matrix counts once."""
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


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's wave lengths are stretched, for contexts longer than the first ones that a model was trained for.

    Attributes:
        kind: linear (all waves alike), llama3 or yarn (long waves alone).
        factor: by which the longest waves grow.
        positions: tokens of the first context, in which the turns of a wave are counted.
        slow, fast: waves of fewer turns than `slow` grow by `factor`, of more than `fast` not at all.
        truncate: yarn's bounds are whole dimensions.
        attention_factor: what queries and keys are multiplied by.
    """

    kind: str
    factor: float
    positions: int = 0
    slow: float = 0.0
    fast: float = 0.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig(Architecture):
    """All that fixes a model's arithmetic: RoPE (half rotation) and the constants of norms and routing
    besides the shape.

    `rope_scaling` None: wave lengths as `rope_theta` gives them. `norm_topk_prob`: the weights of the chosen
    experts are divided by their sum.
    """

    tied_embeddings: bool = True
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ModelConfig:
        """From the plain data that dataclasses.asdict makes of it."""
        scaling = record.get("rope_scaling")
        return cls(**{**record, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})

    @property
    def shape(self) -> Architecture:
        """Without the constants, which no plan reads."""
        values = vars(self)
        return Architecture(**{field.name: values[field.name] for field in fields(Architecture)})
