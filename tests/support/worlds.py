"""One world of processes that walks through layouts, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch.distributed as dist

from megatron_npr.config import ParallelSettings
from megatron_npr.runtime.process_world import World, close_world, init_world
from tests.support.training import axes


def worlds(layouts: Iterable[ParallelSettings]) -> Iterator[World]:
    """A world for each. Layouts of the same axes in a row share its groups; then all groups are closed, for every one has
    threads, and the machine comes to a standstill under those of dozens of layouts."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    for number, (sizes, same) in enumerate(groupby(map(axes, layouts))):
        mine = dist.PrefixStore(f"layout{number}", store)
        dist.init_process_group("gloo", store=mine, rank=rank, world_size=size)
        world = init_world(**sizes)
        for _ in same:
            yield world
        dist.barrier()
        close_world()
