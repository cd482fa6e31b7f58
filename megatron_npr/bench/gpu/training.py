"""Training steps on one GPU: model FLOPs on visible pairs over the measured matmul rate, at two lengths, in bf16 and FP8.

standard layouts, one sequence a row ─► Trainer.step on several rows ─► seconds, MFU, peak memory against `npr plan`'s

Recompute is the lightest that fits by `npr plan`'s memory model. Recomputed work does not count as model FLOPs.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_npr.bench.gpu import model as gpu_model
from megatron_npr.bench.gpu.result import TrainingFigures
from megatron_npr.bench.gpu.timing import matmul_rate
from megatron_npr.config import BatchSettings, Fp8Settings, OptimizerSettings, Recompute
from megatron_npr.data.balance import attended_pairs
from megatron_npr.data.packing import TrainSample
from megatron_npr.model.linears import (
    TRANSFORMER_ENGINE,
    fp8_obstacle,
    linear_modules,
    transformer_engine_version,
)
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.planning import Layout, Modules, Workload, memory_of
from megatron_npr.planning.memory import RUNTIME_BYTES, USABLE
from megatron_npr.planning.times import model_flops
from megatron_npr.rl.losses import sft_loss
from megatron_npr.runtime.peak_memory import peak_memory
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.step_report import StepReport
from megatron_npr.training.trainer import Trainer
from npr_engine.kvcache.memory_size import device_memory
from npr_engine.model.transformer import ModelConfig
from npr_ext.testing import TAGS, random_layout

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Sizes:
    """`rows`: (tokens of a row, rows of a step); `square` of the matrices that give the matmul rate."""

    model: ModelConfig
    dtype: torch.dtype
    rows: tuple[tuple[int, int], ...]
    square: int
    steps: int = 3


FULL = Sizes(gpu_model.FULL, torch.bfloat16, ((8192, 8), (32_768, 2)), 8192)
TINY = Sizes(gpu_model.TINY, torch.float32, ((1024, 2), (2048, 1)), 128, steps=2)


def measure(device: torch.device, *, tiny: bool) -> list[TrainingFigures]:
    """bf16 at all lengths, then FP8 where it can run: Transformer Engine's where it is installed, else torch's own."""
    sizes = TINY if tiny else FULL
    rate = matmul_rate(device, sizes.square, sizes.dtype)
    found = []
    with world_of() as world:
        for fp8 in (None, Fp8Settings()):
            obstacle = _obstacle(device, fp8)
            if obstacle is not None:
                print(f"gpu bench: training in FP8 skipped: {obstacle}")
                continue
            for tokens, rows in sizes.rows:
                found.append(train(world, sizes, tokens, rows, rate, fp8))
                gc.collect()  # a trainer holds itself by its hooks
                torch.cuda.empty_cache()
    return found


def _obstacle(device: torch.device, fp8: Fp8Settings | None) -> str | None:
    if fp8 is None:
        return None
    gpu = device.type == "cuda"
    return fp8_obstacle(
        fp8.recipe,
        torch.cuda.get_device_name(device) if gpu else "cpu",
        torch.cuda.get_device_capability(device) if gpu else None,
        transformer_engine_version(),
    )


def train(
    world: World, sizes: Sizes, tokens: int, rows: int, rate: float, fp8: Fp8Settings | None
) -> TrainingFigures:
    """Median step after one that compiles."""
    device, model = world.device, sizes.model
    recompute = lightest_recompute(model, sizes.dtype, tokens, device, fp8)
    samples = [standard_sample(seed, tokens) for seed in range(rows)]
    with peak_memory(device) as peak:
        trainer = Trainer(
            build_policy(model, world, dtype=sizes.dtype, recompute=recompute, fp8=fp8),
            world,
            optimizer=OptimizerSettings(lr=1e-6),
            batch=BatchSettings(micro_batch_tokens=tokens),
            tags=TAGS,
            pad_id=0,
            num_updates=100,
        )
        reports = list(_steps(trainer, samples, sizes.steps))
    pairs = [attended_pairs(sample, TAGS, branching=True) for sample in samples]
    seconds = statistics.median(report.seconds for report in reports[1:])
    flops = model_flops(model.shape, tokens=tokens * rows, targets=reports[0].num_targets, pairs=sum(pairs))
    planned = memory_of(model.shape, Layout(), _workload(sizes.dtype, tokens, recompute, device, fp8))
    return TrainingFigures(
        precision="fp8" if fp8 else str(sizes.dtype).replace("torch.bfloat16", "bf16").removeprefix("torch."),
        library=linear_modules(device, fp8=fp8 is not None).library,
        row_tokens=tokens,
        rows=rows,
        density=sum(pairs) / (rows * tokens**2),
        recompute=recompute,
        seconds=seconds,
        model_tflops=1e-12 * flops / seconds,
        mfu=flops / seconds / rate,
        peak_gb=peak.gb,
        planned_over_measured=(planned.total - RUNTIME_BYTES) / peak.num_bytes
        if device.type == "cuda"
        else None,
    )


def _steps(trainer: Trainer, samples: list[TrainSample], count: int) -> Iterator[StepReport]:
    for _ in range(count):
        yield trainer.step(samples, lambda log_probs, row: sft_loss(log_probs), branching=True)


def standard_sample(seed: int, tokens: int) -> TrainSample:
    """The standard layout of so many tokens; all of its response is trained."""
    sample = random_layout(seed, tokens)
    ids = sample.token_ids.numpy().astype(np.int32)
    return TrainSample.whole(ids[: sample.prompt_length], ids[sample.prompt_length :], 1.0)


def _workload(
    dtype: torch.dtype, tokens: int, recompute: Recompute, device: torch.device, fp8: Fp8Settings | None
) -> Workload:
    modules: Modules = "cpu"
    if device.type == "cuda":
        modules = "transformer engine" if linear_modules(device) is TRANSFORMER_ENGINE else "torch"
    return Workload(
        bytes_per_weight=dtype.itemsize,
        modules=modules,
        fp8=fp8.recipe if fp8 else None,
        recompute=recompute,
        row_tokens=tokens,
        kv_slots=0,
    )


def lightest_recompute(
    model: ModelConfig,
    dtype: torch.dtype,
    tokens: int,
    device: torch.device,
    fp8: Fp8Settings | None,
) -> Recompute:
    """The first that fits the device by the memory model; on a CPU there is nothing to save."""
    if device.type != "cuda":
        return "none"
    room = USABLE * device_memory(device)
    needs = {
        each: memory_of(model.shape, Layout(), _workload(dtype, tokens, each, device, fp8)).total
        for each in RECOMPUTES
    }
    return next((each for each in RECOMPUTES if needs[each] <= room), "full")
