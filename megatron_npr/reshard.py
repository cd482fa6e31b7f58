"""Trainer weights -> engine weights: aliases where the layouts agree, one planned exchange where they do not.

    plan_exchange (pure, metadata) ──► EngineWeights.tensors (the trainer's own storage wherever this rank holds the weight)
                                  └──► EngineWeights.update() after an optimizer step: only what another stage owns moves

The engine runs at the trainer's tensor-parallel size and without pipeline stages. Without pipeline parallelism every
weight is an alias: zero bytes move and an update is only a new version number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npr.parallel import World
from megatron_npr.policy import PolicyModel, local_weights
from megatron_npr.weights import layer_weight_names, partition_of, shard_shape, unshard, weight_names
from npr_engine.model import ModelConfig


@dataclass(frozen=True)
class Transfer:
    """Weights that pipeline stage `owner` sends to all other stages of its pipeline, in one flat buffer."""

    owner: int
    names: tuple[str, ...]
    num_elements: int


@dataclass(frozen=True)
class UpdateReport:
    """What one weight update cost."""

    version: int
    bytes_moved: int
    bytes_aliased: int


def plan_exchange(config: ModelConfig, *, num_stages: int, tensor_size: int) -> tuple[Transfer, ...]:
    """Who sends what, from metadata alone: every weight is sent by exactly one stage; nothing for one stage."""
    if num_stages == 1:
        return ()
    per_stage = config.num_layers // num_stages
    owned: list[list[str]] = [[] for _ in range(num_stages)]
    owned[0].append("embedding.word_embeddings.weight")
    for layer in range(config.num_layers):
        owned[layer // per_stage] += layer_weight_names(config, layer)
    owned[-1].append("decoder.final_layernorm.weight")
    if not config.tied_embeddings:
        owned[-1].append("output_layer.weight")
    return tuple(
        Transfer(
            owner, tuple(names), sum(math.prod(shard_shape(name, config, tensor_size)) for name in names)
        )
        for owner, names in enumerate(owned)
    )


class EngineWeights:
    """The engine's view of the policy's weights on this rank."""

    def __init__(self, policy: PolicyModel, world: World) -> None:
        config = policy.model_config
        self._world, self._config = world, config
        self._plan = plan_exchange(config, num_stages=world.pipeline_size, tensor_size=world.tensor_size)
        self._own = local_weights(policy)
        self.version = 0
        self.tensors: dict[str, Tensor] = {}
        reference = next(iter(self._own.values()))
        for name in weight_names(config):
            held = self._own.get(name)
            if held is None:
                shape = shard_shape(name, config, world.tensor_size)
                held = torch.empty(shape, dtype=reference.dtype, device=reference.device)
            self.tensors[name] = held
        if self._plan:
            self.update()

    def update(self) -> UpdateReport:
        """Bring the engine's weights to the trainer's; a new version. Collective over each pipeline."""
        moved = 0
        for transfer in self._plan:
            moved += self._broadcast(transfer)
        self.version += 1
        aliased = sum(weight.nbytes for weight in self._own.values())
        return UpdateReport(self.version, moved, aliased)

    def full(self) -> dict[str, Tensor]:
        """Copies of the full (unsharded) weights on the CPU of every rank; collective over each tensor group."""
        self.update()
        config, world = self._config, self._world
        gathered: dict[str, Tensor] = {}
        for name, local in self.tensors.items():
            shards = [local.detach().contiguous()]
            if world.tensor_size > 1:
                shards = [torch.empty_like(shards[0]) for _ in range(world.tensor_size)]
                dist.all_gather(shards, local.detach().contiguous(), group=world.tensor_group)
            gathered[name] = unshard(shards, partition_of(name), config.vocab_size).cpu().clone()
        return gathered

    def _broadcast(self, transfer: Transfer) -> int:
        owns = self._world.pipeline_rank == transfer.owner
        reference = self.tensors[transfer.names[0]]
        if owns:
            flat = torch.cat([self._own[name].reshape(-1) for name in transfer.names])
        else:
            flat = torch.empty(transfer.num_elements, dtype=reference.dtype, device=reference.device)
        source = dist.get_global_rank(self._world.pipeline_group, transfer.owner)
        dist.broadcast(flat, src=source, group=self._world.pipeline_group)
        if owns:
            return 0
        offset = 0
        for name in transfer.names:
            target = self.tensors[name]
            # A tied embedding is held by two stages; the copy of the last one is trained alike and stays its own.
            if name not in self._own:
                target.copy_(flat[offset : offset + target.numel()].view_as(target))
            offset += target.numel()
        return flat.nbytes
