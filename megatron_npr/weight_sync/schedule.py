"""What one rank sends and receives, bucket by bucket, from the plan alone.

Weights are read in place only where that holds for all of the world: otherwise an optimizer step would change some of an
engine's weights at once and the others with the update, and an update that fails would leave a mixture.

A bucket is a run of whole weights of one number format. Both ends of a flow find the same blocks in the same order
(tensor, then offset at the destination), so a bucket is one flat buffer a peer and needs no header.

Bound for an engine in FP8, projections travel as e4m3 under the scales of the rows that the DESTINATION holds: beside its
elements each row of a block costs its largest magnitude on the way there and its scale on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_npr.weight_sync.plan import Plan, Routes, for_replica
from npr_engine.model.architecture import is_projection

SCALE_BYTES = 4


@dataclass(frozen=True)
class Bucket:
    """Blocks in the order of their peers, those that the rank copies to itself, and the elements exchanged with each rank of
    the world; where they travel in FP8, the rows that they are in pieces of."""

    fp8: bool
    sends: Routes  # TRANSFER
    receives: Routes  # TRANSFER
    copies: Routes  # TRANSFER
    send_counts: NDArray[np.int64]  # [world]
    receive_counts: NDArray[np.int64]  # [world]
    send_rows: NDArray[np.int64]  # [world]
    receive_rows: NDArray[np.int64]  # [world]


@dataclass(frozen=True)
class Schedule:
    """Everything that a rank does in an update. `held`: tensors of the engine on this rank; `in_place`: it reads all of
    them from the trainer and nothing is to do; `num_elements`: of `held`."""

    buckets: tuple[Bucket, ...]
    held: tuple[int, ...]
    in_place: bool
    num_elements: int


def schedule(
    planned: Plan,
    rank: int,
    bucket_bytes: int,
    element_size: int,
    *,
    fp8: bool = False,
    in_place: bool = True,
) -> Schedule:
    """The part of `rank`; buckets take about `bucket_bytes` of a replica's weights, more where one weight has more.
    `fp8`: projections travel so, whatever the size of the others' elements is. `in_place`: where no rank of the world has to
    move any weight, the trainer's own are read."""
    own_replica = rank // planned.engine.size
    own = planned.routes[planned.routes["destination"] == rank % planned.engine.size]
    held = tuple(np.unique(own["tensor"]).tolist())
    num_elements = int((own["rows"] * own["row_length"]).sum())
    if in_place and not any(
        len(for_replica(planned, number).transfers) for number in range(planned.num_replicas)
    ):
        return Schedule((), held, True, num_elements)
    sends = []
    for number in range(planned.num_replicas):
        transfers = for_replica(planned, number, in_place=False).transfers
        sends.append(transfers[(transfers["source"] == rank) & (transfers["destination"] != rank)])
        if number == own_replica:
            receives = transfers[transfers["destination"] == rank]
    leaving, quantized = np.concatenate(sends), fp8 & projections(planned)
    buckets = [
        bucket
        for in_fp8, size in ((False, element_size), (True, 1))
        for bucket in _buckets(
            planned, leaving, receives, rank, quantized == in_fp8, max(bucket_bytes // size, 1), in_fp8
        )
    ]
    return Schedule(tuple(buckets), held, False, num_elements)


def projections(planned: Plan) -> NDArray[np.bool_]:
    """Which tensors an engine in FP8 holds so, [tensors]."""
    return np.array([is_projection(name) for name in planned.names])


def num_rows(planned: Plan, blocks: Routes) -> NDArray[np.int64]:
    """Rows of the destination's matrix that each block is a piece of."""
    columns = np.array([shape[-1] for shape in planned.shapes])[blocks["tensor"]]
    rows_of_a_run: NDArray[np.int64] = -(-blocks["row_length"] // columns)  # one run may be many rows
    return blocks["rows"] * rows_of_a_run


def wire_bytes(planned: Plan, transfers: Routes, element_size: int, *, fp8: bool = False) -> int:
    """Bytes that transfers send from one rank to another; with `fp8` those of e4m3, of the amax of rows and of scales."""
    moving = transfers[transfers["source"] != transfers["destination"]]
    quantized = fp8 & projections(planned)[moving["tensor"]]
    elements = moving["rows"] * moving["row_length"]
    agreed = 2 * SCALE_BYTES * num_rows(planned, moving[quantized]).sum()
    return int((elements * np.where(quantized, 1, element_size)).sum() + agreed)


def _buckets(
    planned: Plan,
    sends: Routes,
    receives: Routes,
    rank: int,
    chosen: NDArray[np.bool_],
    bucket_elements: int,
    fp8: bool,
) -> list[Bucket]:
    """Buckets of the chosen tensors; all ranks come to the same number."""
    routes = planned.routes[chosen[planned.routes["tensor"]]]
    if not len(routes):
        return []
    volume = np.bincount(routes["tensor"], weights=routes["rows"] * routes["row_length"])
    bucket_of = np.full(len(chosen), -1)
    bucket_of[: len(volume)] = (np.cumsum(volume) - volume) // bucket_elements
    bucket_of[~chosen] = -1
    made = []
    for bucket in range(bucket_of.max() + 1):
        leaving = _ordered(sends[bucket_of[sends["tensor"]] == bucket], "destination")
        coming = receives[bucket_of[receives["tensor"]] == bucket]
        own = coming["source"] == rank
        made.append(_bucket(planned, fp8, leaving, _ordered(coming[~own], "source"), coming[own]))
    return made


def _bucket(planned: Plan, fp8: bool, sends: Routes, receives: Routes, copies: Routes) -> Bucket:
    counts = []
    for count in (
        lambda blocks: blocks["rows"] * blocks["row_length"],
        lambda blocks: num_rows(planned, blocks),
    ):
        for blocks, peer in ((sends, "destination"), (receives, "source")):
            sums = np.bincount(blocks[peer], weights=count(blocks), minlength=planned.trainer.world_size)
            counts.append(sums.astype(np.int64))
    return Bucket(fp8, sends, receives, copies, *counts)


def _ordered(transfers: Routes, peer: str) -> Routes:
    order = np.lexsort((transfers["destination_offset"], transfers["tensor"], transfers[peer]))
    return transfers[order]
