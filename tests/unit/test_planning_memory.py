"""The activations that `npr plan` counts are those that our layers really keep for their backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_npr.architecture import Architecture
from megatron_npr.parallel import World, megatron_context
from megatron_npr.planning import Layout, Workload
from megatron_npr.planning.memory import activation_bytes_per_token
from megatron_npr.policy import build_policy
from npr_engine.model import ModelConfig
from npr_ext import branch_layout
from tests.training import TAGS

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


def kept_bytes(architecture: Architecture, world: World) -> int:
    """Of all memory that a forward pass keeps for the backward pass, the weights aside; each piece once."""
    policy = build_policy(ModelConfig(**vars(architecture)), world)
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept.setdefault(saved.untyped_storage().data_ptr(), saved)
        return saved

    token_ids = torch.arange(TOKENS) % 80 + 12
    layout = branch_layout(token_ids, tags=TAGS, prompt_lengths=4, branching=False).as_tensor()
    with megatron_context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        policy.logits(token_ids[None], layout)
    return sum(saved.untyped_storage().nbytes() for place, saved in kept.items() if place not in weights)


@pytest.mark.parametrize("name", MODELS)
def test_another_layer_keeps_as_much_as_the_plan_counts(name: str, world: World) -> None:
    few, more = (kept_bytes(replace(MODELS[name], num_layers=count), world) for count in (1, 3))
    planned, _ = activation_bytes_per_token(
        MODELS[name], Layout(), Workload(bytes_per_weight=4, modules="cpu")
    )
    assert (more - few) / (2 * TOKENS) == pytest.approx(planned, rel=0.005)
