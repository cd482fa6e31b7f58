"""The plan of one engine replica, and what it means for each replica of the world.

    kinds x (source shard, destination shard) ──intersect rectangles──► templates (a few dozen blocks each)
    templates x layers x experts x destinations ──numpy──► Plan.routes: shards, not ranks
    for_replica(plan, r) ──► ranks: a holder sends to itself what it has (whole weights: alias, zero bytes)

Every replica has the same routes; only who stands for a shard differs, so one replica is planned and the others follow
by symmetry. Sources are spread evenly: among the copies of a shard the one at the destination's place in its stage sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.catalog import Kind, Place, engine_cut, kinds
from megatron_npr.sharding.cuts import Cut, Piece, local_shape, local_size, pieces
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, check_layouts
from npr_ext.errors import UserError

_BLOCK = [
    ("tensor", "i4"),
    ("source_offset", "i8"),
    ("destination_offset", "i8"),
    ("rows", "i8"),
    ("row_length", "i8"),
    ("source_stride", "i8"),
    ("destination_stride", "i8"),
]

ROUTE = np.dtype(
    [("stage", "i4"), ("shard", "i4"), ("expert", "?"), ("whole", "?"), ("destination", "i4"), *_BLOCK]
)
"""A block of a weight on its way. stage, shard: the trainer ranks that hold it (shard -1: every rank of the stage; of the
expert grid where `expert`). whole: source and destination shards are equal in extent and order. destination: rank within
the replica. Block: `rows` runs of `row_length` elements, `source_stride` apart in the source's flat shard and
`destination_stride` in the destination's, the first at the offsets."""

TRANSFER = np.dtype([("source", "i4"), ("destination", "i4"), *_BLOCK])
"""A transfer: a block from one rank of the world to another, by their numbers."""

Routes = NDArray[np.void]


@dataclass(frozen=True)
class Plan:
    """All routes of one replica; tensor ids index `names` (the order of the catalog, layer by layer) and `shapes`, those
    of an engine rank's shards."""

    trainer: TrainerLayout
    engine: EngineLayout
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    routes: Routes  # ROUTE

    @property
    def num_replicas(self) -> int:
        return self.trainer.world_size // self.engine.size


@dataclass(frozen=True)
class ReplicaPlan:
    """What a replica gets: transfers (source = destination is a copy on the rank itself) and, without any transfer,
    whole weights that its ranks read in place."""

    transfers: Routes  # TRANSFER
    elements_aliased: int

    @property
    def elements_sent(self) -> int:
        """Elements that go from one rank to another."""
        moving = self.transfers[self.transfers["source"] != self.transfers["destination"]]
        return int((moving["rows"] * moving["row_length"]).sum())

    @property
    def elements_copied(self) -> int:
        """Elements that a rank copies to itself into another shape."""
        return int((self.transfers["rows"] * self.transfers["row_length"]).sum()) - self.elements_sent


def plan(architecture: Architecture, trainer: TrainerLayout, engine: EngineLayout) -> Plan:
    """Who sends which block of which weight, for one replica; UserError where a layout does not fit the model."""
    check_layouts(architecture, trainer, engine)
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    parts: list[Routes] = []
    for kind in kinds(architecture):
        layers = range(architecture.num_layers if "{layer}" in kind.pattern else 1)
        experts = range(architecture.num_experts if kind.place is Place.EXPERT else 1)
        first = len(names)
        names += [kind.name(layer, expert) for layer in layers for expert in experts]
        size = engine.etp if kind.place is Place.EXPERT else engine.tp
        shapes += [local_shape(kind.matrix, engine_cut(kind, size), size)] * (len(names) - first)
        stages = _stages(kind, trainer)
        if kind.place is Place.EXPERT:
            parts += _expert_routes(kind, first, stages, len(experts), trainer, engine)
        else:
            parts += _dense_routes(kind, first, stages, trainer, engine)
    return Plan(trainer, engine, tuple(names), tuple(shapes), np.concatenate(parts))


def for_replica(plan: Plan, replica: int, *, in_place: bool = True) -> ReplicaPlan:
    """Ranks instead of shards; without `in_place` whole weights are copied too. UserError where there is no such
    replica."""
    if not 0 <= replica < plan.num_replicas:
        raise UserError(f"replica {replica} does not exist: the world has {plan.num_replicas}")
    routes, trainer = plan.routes, plan.trainer
    destination = routes["destination"] + replica * plan.engine.size
    stage, place = np.divmod(destination, trainer.places)
    num_shards = np.where(routes["expert"], trainer.ep * trainer.etp, trainer.tp)
    own_shard = place % num_shards
    anywhere = routes["shard"] < 0
    holds = (stage == routes["stage"]) & (anywhere | (own_shard == routes["shard"]))
    sender_place = np.where(anywhere, place, place - own_shard + routes["shard"])
    source = np.where(holds, destination, routes["stage"] * trainer.places + sender_place)
    alias = holds & routes["whole"] & in_place

    transfers = np.empty(int((~alias).sum()), TRANSFER)
    transfers["source"], transfers["destination"] = source[~alias], destination[~alias]
    for field, _ in _BLOCK:
        transfers[field] = routes[field][~alias]
    return ReplicaPlan(transfers, int((routes["rows"][alias] * routes["row_length"][alias]).sum()))


def _stages(kind: Kind, trainer: TrainerLayout) -> NDArray[np.int32]:
    """The pipeline stage that sends each weight of a kind; a tied embedding comes from the first stage."""
    if kind.place is Place.EMBEDDING:
        return np.zeros(1, np.int32)
    if kind.place is Place.LAST:
        return np.array([trainer.pp - 1], np.int32)
    return np.array(trainer.stage_of_layers(), np.int32)


def _dense_routes(
    kind: Kind, first: int, stages: NDArray[np.int32], trainer: TrainerLayout, engine: EngineLayout
) -> Iterator[Routes]:
    """Weights that all ranks of the tensor grid share; a replica may hold each shard several times."""
    tensors = first + np.arange(len(stages))
    for shard in range(engine.tp):
        template = _template(kind, shard, trainer.tp, engine.tp)
        for destination in range(shard, engine.size, engine.tp):
            routes = np.tile(template, (len(tensors), 1))
            routes["tensor"], routes["stage"] = tensors[:, None], stages[:, None]
            routes["destination"] = destination
            yield routes.ravel()


def _expert_routes(
    kind: Kind,
    first: int,
    stages: NDArray[np.int32],
    num_experts: int,
    trainer: TrainerLayout,
    engine: EngineLayout,
) -> Iterator[Routes]:
    """Weights of experts: expert e belongs to the rank e // (experts per rank) of either expert grid."""
    experts = np.arange(num_experts)
    senders = experts // (num_experts // trainer.ep)
    receivers = experts // (num_experts // engine.ep)
    tensors = first + np.arange(len(stages) * num_experts).reshape(len(stages), num_experts)
    grid = engine.ep * engine.etp
    for slice_ in range(engine.etp):
        template = _template(kind, slice_, trainer.etp, engine.etp)
        inner = template["shard"]
        for copy in range(0, engine.size, grid):
            routes = np.tile(template, (len(stages), num_experts, 1))
            routes["tensor"], routes["stage"] = tensors[:, :, None], stages[:, None, None]
            routes["shard"] = senders[None, :, None] * trainer.etp + inner
            routes["expert"] = True
            routes["destination"] = copy + receivers[None, :, None] * engine.etp + slice_
            yield routes.ravel()


def _template(kind: Kind, shard: int, num_sources: int, num_shards: int) -> Routes:
    """Routes of one weight of a kind into one destination shard; tensor, stage and destination are left open."""
    matrix, cut, goal = kind.matrix, kind.cut, engine_cut(kind, num_shards)
    wanted = pieces(matrix, goal, shard, num_shards)
    extent = local_size(matrix, goal, num_shards)
    sources = [0] if cut is Cut.REPLICATED else range(num_sources)
    rows: list[tuple[int | bool, ...]] = []
    for source in sources:
        held = pieces(matrix, cut, source, num_sources)
        whole = held == wanted and local_size(matrix, cut, num_sources) == extent
        sender = -1 if cut is Cut.REPLICATED else source
        for piece in held:
            for hole in wanted:
                block = _overlap(piece, hole)
                if block is not None:
                    rows.append((0, sender, False, whole, 0, 0, *block))
    return np.array(rows, ROUTE)


def _overlap(piece: Piece, hole: Piece) -> tuple[int, int, int, int, int, int] | None:
    """(source offset, destination offset, rows, row length, source stride, destination stride) of what both have;
    one long row where it is contiguous on both sides."""
    top, bottom = max(piece.row, hole.row), min(piece.row + piece.rows, hole.row + hole.rows)
    left = max(piece.column, hole.column)
    right = min(piece.column + piece.columns, hole.column + hole.columns)
    if top >= bottom or left >= right:
        return None
    count, length = bottom - top, right - left
    source = piece.offset + (top - piece.row) * piece.stride + left - piece.column
    target = hole.offset + (top - hole.row) * hole.stride + left - hole.column
    if length == piece.stride == hole.stride:
        return source, target, 1, count * length, count * length, count * length
    return source, target, count, length, piece.stride, hole.stride
