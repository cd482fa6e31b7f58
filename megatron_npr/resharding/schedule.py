"""What one rank sends and receives, bucket by bucket, from the plan alone.

Weights are read in place only where that holds for all of the world: otherwise an optimizer step would change some of an
engine's weights at once and the others with the update, and an update that fails would leave a mixture.

A bucket is a run of whole weights. Both ends of a flow find the same blocks in the same order (tensor, then offset at the
destination), so a bucket is one flat buffer a peer and needs no header.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_npr.resharding.plan import TRANSFER, Plan, Routes, for_replica


@dataclass(frozen=True)
class Bucket:
    """Blocks in the order of their peers, and the elements exchanged with each rank of the world."""

    sends: Routes  # TRANSFER
    receives: Routes  # TRANSFER
    send_counts: NDArray[np.int64]  # [world]
    receive_counts: NDArray[np.int64]  # [world]


@dataclass(frozen=True)
class Schedule:
    """Everything that a rank does in an update. `held`: tensors of the engine on this rank; `in_place`: it reads all of
    them from the trainer and nothing is to do; `copies`: blocks that it copies to itself; `num_elements`: of `held`."""

    buckets: tuple[Bucket, ...]
    copies: Routes  # TRANSFER
    held: tuple[int, ...]
    in_place: bool
    num_elements: int


def schedule(planned: Plan, rank: int, bucket_elements: int) -> Schedule:
    """The part of `rank`; buckets take about `bucket_elements` of a replica's elements, more where one weight has more."""
    world, own_replica = planned.trainer.world_size, rank // planned.engine.size
    own = planned.routes[planned.routes["destination"] == rank % planned.engine.size]
    held = tuple(np.unique(own["tensor"]).tolist())
    num_elements = int((own["rows"] * own["row_length"]).sum())
    if not any(len(for_replica(planned, number).transfers) for number in range(planned.num_replicas)):
        return Schedule((), np.empty(0, TRANSFER), held, True, num_elements)
    sends = []
    for number in range(planned.num_replicas):
        transfers = for_replica(planned, number, in_place=False).transfers
        sends.append(transfers[(transfers["source"] == rank) & (transfers["destination"] != rank)])
        if number == own_replica:
            receives = transfers[transfers["destination"] == rank]
    copied = receives["source"] == rank
    buckets = _buckets(planned, np.concatenate(sends), receives[~copied], bucket_elements, world)
    return Schedule(buckets, receives[copied], held, False, num_elements)


def _buckets(
    planned: Plan, sends: Routes, receives: Routes, bucket_elements: int, world: int
) -> tuple[Bucket, ...]:
    routes = planned.routes
    volume = np.bincount(routes["tensor"], weights=routes["rows"] * routes["row_length"])
    bucket_of = ((np.cumsum(volume) - volume) // bucket_elements).astype(np.int64)
    made = []
    for bucket in range(int(bucket_of[-1]) + 1):
        leaving = _ordered(sends[bucket_of[sends["tensor"]] == bucket], "destination")
        coming = _ordered(receives[bucket_of[receives["tensor"]] == bucket], "source")
        made.append(
            Bucket(leaving, coming, _counts(leaving, "destination", world), _counts(coming, "source", world))
        )
    return tuple(made)


def _ordered(transfers: Routes, peer: str) -> Routes:
    order = np.lexsort((transfers["destination_offset"], transfers["tensor"], transfers[peer]))
    return transfers[order]


def _counts(transfers: Routes, peer: str, world: int) -> NDArray[np.int64]:
    elements = transfers["rows"] * transfers["row_length"]
    return np.bincount(transfers[peer], weights=elements, minlength=world).astype(np.int64)
