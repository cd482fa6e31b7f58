"""How the ranks of the world stand together as engines.

`rollout.tp` neighbours are a copy of the model's attention and decode requests of their own. Where `rollout.ep` is larger, so
many neighbours (whole copies) share the experts and decode in step; the planner of weights sees them as one replica.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_npr.config import ParallelSettings, RolloutSettings
from megatron_npr.runtime.process_world import World
from megatron_npr.sharding.layouts import EngineLayout
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError


def engine_layout(
    settings: RolloutSettings, parallel: ParallelSettings, model: ModelConfig, world_size: int
) -> EngineLayout:
    """What is not given is the trainer's; UserError where it does not fit the model, or the engines do not fill the world."""
    layout = EngineLayout.of(model, settings.tp or parallel.tp, settings.ep or parallel.ep)
    for name, size in (("rollout.tp", layout.tp), ("rollout.ep", layout.size)):
        if world_size % size:
            raise UserError(
                f"{name} = {size} does not divide the world of {world_size} processes: choose a divisor"
            )
    return layout


@dataclass(frozen=True)
class EngineShare:
    """Who decodes which turns of a round: copies of attention take them in turn. `rank` is ours; `size` ranks are a copy, and
    its first one speaks for it."""

    rank: int
    size: int
    num_engines: int

    @classmethod
    def of(cls, world: World, settings: RolloutSettings) -> EngineShare:
        """This rank's."""
        size = settings.tp or world.tp_size
        return cls(world.rank, size, world.size // size)

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first one of its engine."""
        return self.rank % self.size == 0

    def own(self, num_turns: int) -> range:
        """The turns that this rank's engine decodes."""
        return self.turns_of(self.rank // self.size, num_turns)

    def turns_of(self, engine: int, num_turns: int) -> range:
        """The turns of any engine, whose first rank is `engine * size`."""
        return range(engine, num_turns, self.num_engines)


@dataclass(frozen=True)
class EngineGroups:
    """The ranks that share this rank's copy of attention (None: it is alone), and those that share its experts where they are
    more."""

    tp: dist.ProcessGroup | None
    experts: dist.ProcessGroup | None


def engine_groups(world: World, layout: EngineLayout) -> EngineGroups:
    """The groups of this rank, for a layout that fills the world. Collective over it."""
    return EngineGroups(
        None if layout.tp == 1 else _neighbours(world, layout.tp),
        _neighbours(world, layout.size) if layout.size > layout.tp else None,
    )


def _neighbours(world: World, size: int) -> dist.ProcessGroup:
    if size == world.tp_size:
        return world.tp_group  # consecutive ranks, too
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
    return groups[world.rank // size]
