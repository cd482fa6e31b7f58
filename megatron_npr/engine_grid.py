"""How the ranks of the world stand together as engine replicas: `rollout.tp` consecutive ranks decode as one engine."""

from __future__ import annotations

import torch.distributed as dist

from megatron_npr.config import ParallelSettings, RolloutSettings
from megatron_npr.parallel import World
from megatron_npr.resharding import EngineLayout
from npr_engine.model import ModelConfig
from npr_ext.errors import UserError


def engine_layout(settings: RolloutSettings, parallel: ParallelSettings, model: ModelConfig) -> EngineLayout:
    """Sizes of one replica: what is not given is the trainer's. Experts lie on the ranks of the replica, `ep` of them with
    whole experts each or, where `ep` is smaller than `tp`, cut over the tp / ep ranks that share theirs."""
    tp, ep = settings.tp or parallel.tp, settings.ep or parallel.ep
    if tp % ep:
        raise UserError(
            f"rollout.ep = {ep} can be planned (npr plan), but the engine spreads experts over its own rollout.tp = {tp} "
            "ranks only: set rollout.ep to a divisor of it"
        )
    return EngineLayout(tp, ep, tp // ep) if model.num_experts else EngineLayout(tp)


def replica_of(world: World, size: int) -> tuple[int, int]:
    """(this rank's replica, replicas in all) for replicas of `size` ranks; UserError where they do not fill the world."""
    if world.size % size:
        raise UserError(
            f"rollout.tp = {size} does not divide the world of {world.size} processes: choose a divisor"
        )
    return world.rank // size, world.size // size


def engine_group(world: World, size: int) -> dist.ProcessGroup | None:
    """The ranks of this rank's replica; None for a replica of one. Collective over the world."""
    replica, replicas = replica_of(world, size)
    if size == 1:
        return None
    if size == world.tensor_size:
        return world.tensor_group  # consecutive ranks, too
    groups = [dist.new_group(list(range(each * size, (each + 1) * size))) for each in range(replicas)]
    return groups[replica]
