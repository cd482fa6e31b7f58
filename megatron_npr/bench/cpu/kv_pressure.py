"""How full the KV cache is when it is full: branching responses arrive until a first one has to give way.

a request every few steps ─► Engine.step ─► the first preemption ─► stats().kv_utilisation, counted from the tables
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npr.bench.cpu.bench_model import BenchModel
from megatron_npr.bench.cpu.script import Script
from npr_engine.engine import Engine

STEPS_BETWEEN_ARRIVALS = 4
"""So that responses stand at different places: in their plans, inside branches, behind the join."""


@dataclass(frozen=True)
class PressureFigures:
    """Live token slots / all slots just before the first preemption."""

    kv_utilisation: float
    block_size: int
    num_kv_slots: int
    responses: int


def measure(
    engine: Engine, model: BenchModel, script: Script, prompts: Sequence[Sequence[int]]
) -> PressureFigures:
    """Until memory runs out for the first time, which the prompts' responses must suffice for; then all are aborted."""
    model.script = script.next_token
    submitted = step = 0
    try:
        while (utilisation := engine.stats().kv_utilisation) is None:
            if step % STEPS_BETWEEN_ARRIVALS == 0 and submitted < len(prompts):
                engine.submit(engine.request(prompts[submitted], script.params, str(submitted)))
                submitted += 1
            assert engine.num_unfinished, f"{submitted} responses have ended and memory was never short"
            engine.step()
            step += 1
    finally:
        model.script = None
        for index in range(submitted):
            engine.abort(str(index))
        engine.take_output()
    config = engine.config
    return PressureFigures(utilisation, config.block_size, config.num_kv_slots, submitted)
