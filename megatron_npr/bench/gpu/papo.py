"""One PAPO step of a colocated trainer and engine, by phase: what it takes and the memory that it peaks at.

random weights ─► trainer's state leaves ─► rollout (scripted, branching) ─► state comes back ─► advantages ─► update ─►
engine's weights (zero copy)

The first step compiles and captures; the second one counts. Random weights say nothing that could be verified: a script says
what is valid, and rewards are drawn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_npr.bench.cpu.script import response_script
from megatron_npr.bench.gpu import model as gpu_model
from megatron_npr.bench.gpu.model import ScriptedModel
from megatron_npr.bench.gpu.result import PapoFigures, PhaseFigures
from megatron_npr.bench.gpu.timing import synchronize
from megatron_npr.config import BatchSettings, MemorySettings, OptimizerSettings, Recompute
from megatron_npr.data.packing import PackedRow, TrainSample
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.rl.advantage import papo_advantages
from megatron_npr.rl.losses import LossSum, papo_loss
from megatron_npr.rollout.collect import train_sample
from megatron_npr.runtime.peak_memory import peak_memory
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.sharding.layouts import EngineLayout
from megatron_npr.training.engine_weights import EngineWeights
from megatron_npr.training.offload import TrainerMemory
from megatron_npr.training.trainer import Trainer
from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import ModelConfig
from npr_engine.rollout import Rollout
from npr_engine.testing import GRAMMAR, VOCABULARY


@dataclass(frozen=True)
class Sizes:
    """`prompts` x `samples` responses with one block of `branches`."""

    model: ModelConfig
    dtype: torch.dtype
    recompute: Recompute
    prompts: int
    samples: int
    prompt_tokens: int
    branches: int
    branch_tokens: int
    row_tokens: int
    kv_slots: int


OFFLOADED = MemorySettings(offload_optimizer=True)
FULL = Sizes(gpu_model.FULL, torch.bfloat16, "full", 8, 8, 256, 5, 240, 32_768, 131_072)
TINY = Sizes(gpu_model.TINY, torch.float32, "full", 2, 2, 8, 2, 6, 512, 1024)


def measure(device: torch.device, *, tiny: bool) -> PapoFigures:
    """Figures of the second step of training; the first one compiles."""
    with world_of() as world:
        run = Run(world, TINY if tiny else FULL)
        run.step(0)
        return run.step(1)


class Run:
    """Trainer, engine over its very weights, and the clock of their phases."""

    def __init__(self, world: World, sizes: Sizes) -> None:
        self._world, self._sizes = world, sizes
        self._trainer = Trainer(
            build_policy(sizes.model, world, dtype=sizes.dtype, recompute=sizes.recompute),
            world,
            optimizer=OptimizerSettings(lr=1e-6),
            batch=BatchSettings(micro_batch_tokens=sizes.row_tokens),
            tags=VOCABULARY.tags,
            pad_id=0,
            num_updates=10,
        )
        self._weights = EngineWeights(self._trainer.policy, EngineLayout())
        self._model = ScriptedModel(sizes.model, self._weights.tensors, sizes.kv_slots)
        self._engine = Engine(self._model, GRAMMAR, EngineConfig(num_kv_slots=sizes.kv_slots))
        self._phases: dict[str, PhaseFigures] = {}

    def step(self, number: int) -> PapoFigures:
        """One round: the loop of megatron_npr.stages.stage3 without its verifier."""
        self._phases = {}
        memory = TrainerMemory(self._trainer, OFFLOADED)
        with self._phase("offload"):
            memory.offload()
        with self._phase("rollout"):
            rollouts = self._rollouts()
        with self._phase("onload"):
            memory.onload()
        with self._phase("update"):
            samples = self._samples(rollouts, number)
            report = self._trainer.step(samples, objective, branching=True)
        with self._phase("weight sync"):
            exchanged = self._weights.update()
            self._engine.update_weights(self._weights.tensors, exchanged.version)
        return PapoFigures(
            responses=len(rollouts),
            response_tokens=rollouts[0].num_tokens,
            trained_tokens=report.num_targets,
            phases=self._phases,
            zero_copy_ms=1e3 * self._phases["weight sync"].seconds,
            zero_copy_bytes=exchanged.sent + exchanged.copied,
        )

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        synchronize(self._world.device)
        with peak_memory(self._world.device) as peak:
            began = time.perf_counter()
            yield
            synchronize(self._world.device)
            seconds = time.perf_counter() - began
        self._phases[name] = PhaseFigures(seconds, peak.gb)

    def _rollouts(self) -> list[Rollout]:
        sizes = self._sizes
        script = response_script(
            VOCABULARY, sizes.prompt_tokens, branches=sizes.branches, branch_tokens=sizes.branch_tokens
        )
        self._model.follow(script.next_token)
        drawn = np.random.default_rng(0).integers(12, 40, (sizes.prompts, sizes.prompt_tokens))
        prompts = [prompt.tolist() for prompt in drawn for _ in range(sizes.samples)]
        return self._engine.generate(prompts, script.params)

    def _samples(self, rollouts: list[Rollout], number: int) -> list[TrainSample]:
        """With the advantages of rewards that are drawn."""
        groups = np.repeat(np.arange(self._sizes.prompts), self._sizes.samples)
        rewards = np.random.default_rng(number).normal(size=len(groups))
        values = papo_advantages(rewards, groups).values.tolist()
        return [train_sample(rollout, value) for rollout, value in zip(rollouts, values, strict=True)]


def objective(log_probs: torch.Tensor, row: PackedRow) -> LossSum:
    """PAPO on one row."""
    return papo_loss(log_probs, row.advantages.to(log_probs))
