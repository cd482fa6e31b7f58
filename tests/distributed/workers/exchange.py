"""One rank of a world that walks through layouts, updates the engine's weights twice and is disturbed on purpose.

Started by `test_weight_exchange.py`: exchange.py RANK WORLD FOLDER; writes walkRANK.json, fp8_RANK.json,
damagedRANK.json and lostRANK.json there.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout
from megatron_npr.weight_sync.exchange import WeightExchange, WeightUpdateError
from megatron_npr.weight_sync.plan import plan
from npr_engine.model.fp8 import Fp8Weight
from tests.support.resharding_model import DENSE, MOE, PADDING, Model, engine_shards, trainer_shards

CASES: dict[str, tuple[Architecture, TrainerLayout, EngineLayout]] = {
    "tp4 to tp2": (DENSE, TrainerLayout((4,), tp=4), EngineLayout(2)),
    "tp2 x pp2 with two chunks to tp4": (DENSE, TrainerLayout((1, 1, 1, 1), tp=2, pp=2), EngineLayout(4)),
    "dp4 to tp4": (DENSE, TrainerLayout((4,), dp_cp=4), EngineLayout(4)),
    "uneven pp4 to tp1": (DENSE, TrainerLayout((0, 2, 1, 1), pp=4), EngineLayout(1)),
    "tp2 to tp1": (DENSE, TrainerLayout((4,), tp=2, dp_cp=2), EngineLayout(1)),
    "tp1 to tp2": (DENSE, TrainerLayout((4,), dp_cp=4), EngineLayout(2)),
    "pp2 to tp2": (DENSE, TrainerLayout((2, 2), pp=2, dp_cp=2), EngineLayout(2)),
    "zero copy": (DENSE, TrainerLayout((4,), tp=2, dp_cp=2), EngineLayout(2)),
    "experts over four to two": (MOE, TrainerLayout((5,), dp_cp=4, ep=4), EngineLayout(1, 2)),
    "experts under tp2 x pp2 to ep4": (MOE, TrainerLayout((3, 2), tp=2, pp=2, ep=2), EngineLayout(4, 4)),
}


def matrix() -> dict[str, tuple[Architecture, TrainerLayout, EngineLayout]]:
    """Eight processes: every {TP 1, 2, 4} x {PP 1, 2} x {VPP 1, 2} x {EP 1, 2} into engine TP {1, 2, 4}."""
    cases = {}
    pipelines = [(1, 1), (2, 1), (2, 2)]
    for architecture, experts in ((DENSE, (1,)), (MOE, (1, 2))):
        for tp, (pp, vpp), ep, engine_tp in itertools.product((1, 2, 4), pipelines, experts, (1, 2, 4)):
            outer = architecture.num_layers - (pp * vpp - 1)
            trainer = TrainerLayout((outer, *[1] * (pp * vpp - 1)), tp=tp, pp=pp, dp_cp=8 // (tp * pp), ep=ep)
            name = f"{'moe' if architecture is MOE else 'dense'} tp{tp} pp{pp} vpp{vpp} ep{ep}"
            cases[f"{name} to tp{engine_tp}"] = (architecture, trainer, EngineLayout(engine_tp))
    return cases


WORLDS = {4: CASES, 8: matrix()}
"""Cases by the number of processes."""


class DeadlySources(Mapping[str, Tensor]):
    """Shards whose owner dies when `fatal` is read, once `armed`."""

    def __init__(self, shards: Mapping[str, Tensor], fatal: str) -> None:
        self._shards, self._fatal, self.armed = shards, fatal, False

    def __getitem__(self, name: str) -> Tensor:
        if self.armed and name == self._fatal:
            os._exit(17)
        return self._shards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def shards_of(architecture: Architecture, trainer: TrainerLayout, rank: int) -> dict[str, Tensor]:
    held = trainer_shards(Model(architecture), trainer)[rank]
    return {name: torch.from_numpy(labels).float().clone() for name, labels in held.items()}


def difference(
    exchange: WeightExchange, architecture: Architecture, engine: EngineLayout, rank: int, added: float
) -> float:
    """Largest error against the numbers that this rank of the engine has to hold, padding aside."""
    wanted = engine_shards(Model(architecture), engine)[rank % engine.size]
    assert set(exchange.tensors) == set(wanted)
    worst = 0.0
    for name, labels in wanted.items():
        expected = torch.from_numpy(labels).float()
        real = expected != PADDING
        worst = max(worst, float((exchange.tensors[name].view(-1) - expected - added)[real].abs().max()))
    return worst


def real(labels: NDArray[np.int64]) -> Tensor:
    """A number for every label, of all magnitudes."""
    phase = torch.from_numpy(labels).double() * 0.7390851332151607
    return (torch.sin(phase) * torch.exp(3 * torch.cos(5 * phase))).float()


def walk_in_fp8(rank: int, world: int) -> dict[str, Any]:
    """Every case for an engine in FP8, two updates each: how many bytes differ from what the engine makes of its whole shard,
    and the bytes moved."""
    figures = {}
    for case, (architecture, trainer, engine) in WORLDS[world].items():
        held = trainer_shards(Model(architecture), trainer)[rank]
        shards = {name: real(labels) for name, labels in held.items()}
        planned = plan(architecture, trainer, engine)
        exchange = WeightExchange(planned, shards, bucket_bytes=512, fp8=True)
        exchange.update(1)
        for shard in shards.values():
            shard.mul_(-1.7).pow_(3)
        moved = exchange.update(2)
        wrong = 0
        wanted = engine_shards(Model(architecture), engine)[rank % engine.size]
        assert set(exchange.tensors) | set(exchange.fp8) == set(wanted)
        for name, labels in wanted.items():
            expected = real(labels).mul(-1.7).pow(3)[torch.from_numpy(labels) != PADDING]
            if name in exchange.fp8:
                got = exchange.fp8[name]
                whole = Fp8Weight.of(expected.view(got.shape))
                wrong += int((got.values_DC.view(torch.uint8) != whole.values_DC.view(torch.uint8)).sum())
                wrong += int((got.scales_D != whole.scales_D).sum())
            else:
                wrong += int((exchange.tensors[name].view(-1)[: len(expected)] != expected).sum())
        figures[case] = {
            "wrong": wrong,
            "projections": sorted(exchange.fp8),
            "moved": [moved.sent, moved.received, moved.copied, moved.in_place],
        }
    return figures


def walk(rank: int, world: int) -> dict[str, Any]:
    """Every case: two updates, then a stale one and a torn one, which change nothing."""
    figures = {}
    for case, (architecture, trainer, engine) in WORLDS[world].items():
        shards = shards_of(architecture, trainer, rank)
        exchange = WeightExchange(plan(architecture, trainer, engine), shards, bucket_bytes=512)
        first = exchange.update(1)
        errors = [difference(exchange, architecture, engine, rank, 0.0)]
        for shard in shards.values():
            shard += 4096.0
        exchange.update(5)
        errors.append(difference(exchange, architecture, engine, rank, 4096.0))
        refused = []
        for version in (5, 6 + rank):
            try:
                exchange.update(version)
            except WeightUpdateError as error:
                refused.append(str(error))
        errors.append(difference(exchange, architecture, engine, rank, 4096.0))
        figures[case] = {
            "errors": errors,
            "refused": refused,
            "version": exchange.version,
            "moved": [first.sent, first.received, first.copied, first.in_place],
        }
    return figures


class FaultyNetwork:
    """The all-to-all of this process in the with-block: one bit of what arrives in the `fault`-th is not what was sent.
    `arrived`: elements of each."""

    def __init__(self, fault: int) -> None:
        self._fault, self._whole = fault, dist.all_to_all_single
        self.arrived: list[int] = []

    def __enter__(self) -> FaultyNetwork:
        dist.all_to_all_single = self._exchange
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._whole

    def _exchange(self, arriving: Tensor, *args: Any, **kwargs: Any) -> None:
        self._whole(arriving, *args, **kwargs)
        if len(self.arrived) == self._fault:
            arriving.view(torch.uint8)[-1] ^= 4
        self.arrived.append(arriving.numel())


def damage(rank: int) -> dict[str, Any]:
    """One update in FP8 after the other, each with a bit damaged at rank 2: in a bucket, in row maxima, in scales."""
    architecture, trainer, engine = CASES["tp4 to tp2"]
    held = trainer_shards(Model(architecture), trainer)[rank]
    shards = {name: real(labels) for name, labels in held.items()}
    exchange = WeightExchange(plan(architecture, trainer, engine), shards, bucket_bytes=512, fp8=True)
    with FaultyNetwork(-1) as network:
        exchange.update(1)
    kept = [weight.clone() for weight in exchange.tensors.values()]
    kept += [part.clone() for weight in exchange.fp8.values() for part in (weight.values_DC, weight.scales_D)]
    for shard in shards.values():
        shard.mul_(2.0)
    arrived: list[Any] = [network.arrived[:-1]]  # the last one carries the checksums
    dist.broadcast_object_list(arrived, src=2)
    faults, refused, changed = [call for call, elements in enumerate(arrived[0]) if elements], 0, 0
    for fault in faults:
        with FaultyNetwork(fault if rank == 2 else -1):
            try:
                exchange.update(2)
            except WeightUpdateError as error:
                refused += "arrived damaged; version 1 stays" in str(error)
        now = [*exchange.tensors.values()]
        now += [part for weight in exchange.fp8.values() for part in (weight.values_DC, weight.scales_D)]
        changed += sum(
            not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(kept, now, strict=True)
        )
        assert exchange.version == 1, f"the damage of exchange {fault} went unseen"
    return {"faults": len(faults), "refused": refused, "changed": changed}


def lose_a_sender(rank: int) -> dict[str, Any]:
    """Rank 1 dies in the midst of the second update."""
    architecture, trainer, engine = CASES["tp4 to tp2"]
    shards = shards_of(architecture, trainer, rank)
    sources = DeadlySources(shards, "decoder.layers.3.mlp.linear_fc2.weight")
    exchange = WeightExchange(plan(architecture, trainer, engine), sources, bucket_bytes=512)
    exchange.update(1)
    for shard in shards.values():
        shard += 4096.0
    sources.armed = rank == 1
    try:
        exchange.update(2)
    except WeightUpdateError as error:
        return {
            "error": str(error),
            "version": exchange.version,
            "difference": difference(exchange, architecture, engine, rank, 0.0),
        }
    raise AssertionError("the update went through without a sender")


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )
    (folder / f"walk{rank}.json").write_text(json.dumps(walk(rank, world)))
    (folder / f"fp8_{rank}.json").write_text(json.dumps(walk_in_fp8(rank, world)))
    dist.barrier()
    if world != 4:
        dist.destroy_process_group()
        return
    (folder / f"damaged{rank}.json").write_text(json.dumps(damage(rank)))
    (folder / f"lost{rank}.json").write_text(json.dumps(lose_a_sender(rank)))
    os._exit(0)  # the group is broken; nothing of it can be taken down in order


if __name__ == "__main__":
    main()
