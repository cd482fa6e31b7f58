"""What layers keep for their backward pass, by torch's hooks on saved tensors; and the models that are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_npr.config import Fp8Settings, Recompute
from megatron_npr.model.linears import LinearModules
from megatron_npr.model.policy import Policy
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.sharding.architecture import Architecture
from npr_engine.model.transformer import ModelConfig
from npr_ext import branch_layout
from tests.support.training import TAGS

TOKENS = 512
DENSE = Architecture(
    num_layers=1,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_hidden_size=256,
    vocab_size=100,
)
MODELS = {
    "qwen3": DENSE,
    "without norms of the heads": replace(DENSE, qk_norm=False),
    "experts": replace(DENSE, ffn_hidden_size=64, num_experts=8, experts_per_token=3),
}


@dataclass(frozen=True)
class Kept:
    """Bytes of a layer: for the backward pass, a token; of FP8 copies of weights, a weight of its projections."""

    per_token: float
    per_weight: float


def kept_by_a_layer(
    architecture: Architecture,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    fp8: Fp8Settings | None = None,
    linears: LinearModules | None = None,
) -> Kept:
    """What one layer more keeps: what three keep less what one does."""
    found = []
    for count in (1, 3):
        policy = build_policy(
            ModelConfig(**vars(replace(architecture, num_layers=count))),
            world,
            dtype=dtype,
            recompute=recompute,
            fp8=fp8,
            linears=linears,
        )
        weights = sum(weight.numel() for name, weight in policy.named_parameters() if _is_projection(name))
        found.append((*_kept_bytes(policy), weights))
    (few, few_copies, few_weights), (more, more_copies, more_weights) = found
    return Kept((more - few) / (2 * TOKENS), (more_copies - few_copies) / (more_weights - few_weights))


def _kept_bytes(policy: Policy) -> tuple[int, int]:
    """(of a forward pass, each piece once, without weights; of FP8 copies of weights)."""
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    token_ids = torch.arange(TOKENS) % 80 + 12
    layout = branch_layout(token_ids, tags=TAGS, prompt_lengths=4, branching=False).as_tensor()
    policy.train()
    with megatron_context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        policy.logits(token_ids[None], layout)
    copies = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for module in policy.modules()
        if "_fp8_workspaces" in vars(module)  # Transformer Engine's
        for copy in module._fp8_workspaces.values()
        for part in copy.get_data_tensors()
        if part is not None
    }
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    return sum(size for place, size in kept.items() if place not in weights | copies.keys()), sum(
        copies.values()
    )


def _is_projection(name: str) -> bool:
    return "linear_" in name and "layer_norm" not in name
