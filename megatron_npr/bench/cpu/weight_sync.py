"""`npr bench weight_sync`: what a plan costs at the paper's scale, and what it moves.

Qwen3-235B-A22B on 512 ranks (TP8 x PP8 x EP8, 94 layers split 11, 12 x 6, 11) ──► engine replicas ──► seconds, bytes
a layout that the engine shares ──► 0 bytes
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from megatron_npr.bench.timing import peak_bytes
from megatron_npr.sharding.architecture import KNOWN
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, split_layers
from megatron_npr.weight_sync.plan import Plan, for_replica, plan
from megatron_npr.weight_sync.schedule import wire_bytes

BYTES = 2  # bf16
MODEL = "Qwen3-235B-A22B"
TRAINER = TrainerLayout(split_layers(94, pp=8, first=11, last=11), tp=8, pp=8, dp_cp=8, ep=8, etp=1)
ENGINES = {"8 ranks": EngineLayout(8, 8, 1), "64 ranks": EngineLayout(8, 8, 8)}
"""TP8 x EP8 over the same eight ranks, and with every expert cut over eight ranks."""


def measure() -> dict[str, object]:
    """Planning figures of both readings of "engine TP8 x EP8", and the zero-copy case."""
    return {
        "model": MODEL,
        "world": TRAINER.world_size,
        "engines": {name: figures(engine) for name, engine in ENGINES.items()},
        "zero_copy": zero_copy(),
    }


def figures(engine: EngineLayout) -> dict[str, float]:
    """Time and memory of planning one replica, and the bytes that reach it and all replicas."""
    began = time.perf_counter()
    planned = plan(KNOWN[MODEL], TRAINER, engine)
    first = for_replica(planned, 0)
    one_replica = time.perf_counter() - began
    sent = [for_replica(planned, replica).elements_sent for replica in range(planned.num_replicas)]
    return {
        "replicas": planned.num_replicas,
        "tensors": len(planned.names),
        "transfers": len(first.transfers),
        "seconds": one_replica,
        "seconds_all_replicas": time.perf_counter() - began,
        "peak_bytes": peak_bytes(functools.partial(prepare, engine)),
        "bytes_sent_to_first_replica": BYTES * first.elements_sent,
        "bytes_sent_to_first_replica_in_fp8": wire_bytes(planned, first.transfers, BYTES, fp8=True),
        "bytes_copied_on_ranks_of_first_replica": BYTES * first.elements_copied,
        "bytes_read_in_place_by_first_replica": BYTES * first.elements_aliased,
        "bytes_sent_to_all_replicas": BYTES * sum(sent),
    }


def prepare(engine: EngineLayout) -> Callable[[], Plan]:
    """The work whose memory is measured."""
    return functools.partial(plan, KNOWN[MODEL], TRAINER, engine)


def zero_copy() -> dict[str, int | str]:
    """Qwen3-4B trained and decoded at TP2: the engine's weights are the trainer's."""
    trainer = TrainerLayout(split_layers(36, pp=1), tp=2, dp_cp=4)
    planned = plan(KNOWN["Qwen3-4B"], trainer, EngineLayout(2))
    found = [for_replica(planned, replica) for replica in range(planned.num_replicas)]
    return {
        "model": "Qwen3-4B",
        "world": trainer.world_size,
        "transfers": sum(len(each.transfers) for each in found),
        "bytes_sent": BYTES * sum(each.elements_sent + each.elements_copied for each in found),
        "bytes_read_in_place": BYTES * sum(each.elements_aliased for each in found),
    }
