"""`npr bench plan`: the memory model of `npr plan` against real training steps on the CPU, one process each.

case ──► memory_of (planned) ──┐
     └─► Trainer, two steps ───┴──► peak of resident memory (measured), planned / measured

The measured processes give large blocks back to the system at once (MALLOC_MMAP_THRESHOLD_): otherwise glibc keeps freed
pieces of the model's initialisation, which is no part of the job (and on a GPU the allocator uses them again).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from megatron_npr.bench.timing import peak_bytes
from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.planning import Layout, Workload, memory_of
from megatron_npr.planning.memory import RUNTIME_BYTES
from megatron_npr.rl.losses import sft_loss
from megatron_npr.runtime.process_world import World, init_world
from megatron_npr.sharding.architecture import Architecture
from megatron_npr.training.trainer import Trainer
from npr_engine.model.transformer import ModelConfig
from npr_ext import TagIds

CASES = {
    "weights": (Architecture(12, 512, 8, 4, 64, 2048, 4096, tied_embeddings=True), 512),
    "activations": (Architecture(8, 256, 4, 2, 64, 1024, 512), 4096),
    "vocabulary": (Architecture(2, 256, 4, 2, 64, 512, 65_536, tied_embeddings=True), 2048),
}
"""A model and the tokens of its row, by what takes most of the memory."""

WARM_UP = (Architecture(1, 16, 2, 1, 8, 16, 100), 64)
RETURN_BLOCKS_OVER = 1_000_000


def measure() -> dict[str, object]:
    """Planned and measured bytes of every case."""
    return {name: compare(name) for name in CASES}


def compare(name: str) -> dict[str, float]:
    """Bytes that training adds to a process, as planned and as measured."""
    architecture, tokens = CASES[name]
    work = Workload(bytes_per_weight=4, modules="cpu", row_tokens=tokens, kv_slots=0)
    planned = memory_of(architecture, Layout(), work).total - RUNTIME_BYTES
    with _blocks_returned():
        measured = peak_bytes(functools.partial(prepare, name))
    return {"planned_bytes": planned, "measured_bytes": measured, "ratio": planned / measured}


def prepare(name: str) -> Callable[[], object]:
    """The work whose memory is measured; everything that a first step loads is loaded."""
    torch.set_num_threads(1)
    world = init_world()
    train(*WARM_UP, world)
    return functools.partial(train, *CASES[name], world)


def train(architecture: Architecture, tokens: int, world: World) -> Trainer:
    """Two SFT steps on one full row."""
    trainer = Trainer(
        build_policy(ModelConfig(**vars(architecture)), world),
        world,
        optimizer=OptimizerSettings(lr=1e-3),
        batch=BatchSettings(micro_batch_tokens=tokens),
        tags=TagIds(*range(2, 10)),
        pad_id=0,
        num_updates=10,
    )
    response = np.random.default_rng(0).integers(12, 90, tokens - 8).astype(np.int32)
    sample = TrainSample.whole(np.arange(12, 20, dtype=np.int32), response, 1.0)
    for _ in range(2):
        trainer.step([sample], lambda log_probs, row: sft_loss(log_probs), branching=False)
    return trainer


@contextlib.contextmanager
def _blocks_returned() -> Iterator[None]:
    """Processes started inside give freed large blocks back to the system."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(RETURN_BLOCKS_OVER)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
