"""The policy's parameters on this rank by global name, and how a Hugging Face folder fills them."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_npr.hf.huggingface import HuggingFaceWeights
from megatron_npr.model.fp8_parameters import fill, plain_or_fp8
from megatron_npr.model.policy import Policy
from megatron_npr.runtime.process_world import on_every_rank
from megatron_npr.sharding.catalog import catalog
from megatron_npr.sharding.weights import global_name, shard


def local_weights(policy: Policy) -> dict[str, Tensor]:
    """This rank's parameters by global name; the tensors themselves, no copies. Those held in FP8 are `fp8_parameters`'."""
    config, world = policy.config, policy.world
    named: dict[str, Tensor] = {}
    first_expert = world.ep_rank * (policy.model_config.num_experts // world.ep_size)
    for chunk in policy.chunks:
        offset = get_transformer_layer_offset(config, vp_stage=chunk.vp_stage, pp_rank=world.pp_rank)
        named |= {
            global_name(name, first_layer=offset, first_expert=first_expert): plain_or_fp8(weight)
            for name, weight in chunk.named_parameters()
        }
    if policy.model_config.tied_embeddings:
        # With pipeline parallelism the last stage holds a copy of the tied embedding under the output layer's name.
        copy = named.pop("output_layer.weight", None)
        if copy is not None:
            named.setdefault("embedding.word_embeddings.weight", copy)
    return named


def load_policy_weights(policy: Policy, folder: Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder; UserError on every rank where one cannot. Collective."""
    world, listed = policy.world, catalog(policy.model_config)

    def load() -> None:
        with HuggingFaceWeights(folder, policy.model_config) as source, torch.no_grad():
            for name, weight in local_weights(policy).items():
                entry = listed[name]
                cut = entry.trainer_cut(policy.layout, world.rank)
                fill(weight, shard(source.full(name), entry.kind.matrix, *cut))

    on_every_rank(load)
