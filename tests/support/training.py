"""Training of tiny models as the tests do it: samples with branches, a trainer of a model folder, a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_npr.config import BatchSettings, Fp8Settings, OptimizerSettings, ParallelSettings, Recompute
from megatron_npr.data.packing import TrainSample
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model.linears import LinearModules
from megatron_npr.model.policy_builder import NO_AXES, build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.rl.losses import sft_loss
from megatron_npr.runtime.process_world import World
from megatron_npr.training.trainer import Trainer
from npr_ext import TagIds

TAGS = TagIds(*range(2, 10))
FAST = OptimizerSettings(lr=1e-2)


def branching_samples() -> list[TrainSample]:
    """Six responses with one block of two to three branches each, three prompts."""
    rng = np.random.default_rng(5)

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(12, 96, count)]

    samples = []
    for index in range(6):
        prompt = np.array([11, 20 + index // 2, 30, 10], np.int32)
        branches = 2 + index % 2
        response = [TAGS.guideline]
        for _ in range(branches):
            response += [TAGS.plan, *text(3), TAGS.plan_end]
        response += [TAGS.guideline_end]
        for branch in range(branches):
            response += [10, TAGS.step, *text(4 + 3 * branch), TAGS.step_end]
        response += [10, TAGS.takeaway, *text(4), TAGS.takeaway_end, *text(3), 1]
        ids = np.array(response, np.int32)
        loss_mask = rng.random(len(ids)) > 0.1
        samples.append(
            TrainSample(prompt, ids, loss_mask, np.zeros(len(ids), np.float32), float(rng.normal()))
        )
    return samples


def new_trainer(
    world: World,
    model_folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerSettings = FAST,
    parallel: ParallelSettings = NO_AXES,
    recompute: Recompute = "none",
    fp8: Fp8Settings | None = None,
    linears: LinearModules | None = None,
    overlap_param_gather: bool = False,
) -> Trainer:
    """For ten updates, from the weights of a Hugging Face folder; `linears`: the device's by default."""
    policy = build_policy(
        read_model_config(model_folder),
        world,
        dtype=dtype,
        parallel=parallel,
        recompute=recompute,
        fp8=fp8,
        linears=linears,
    )
    load_policy_weights(policy, model_folder)
    return Trainer(
        policy,
        world,
        optimizer=optimizer,
        batch=BatchSettings(micro_batch_tokens=128),
        tags=TAGS,
        pad_id=0,
        num_updates=10,
        overlap_param_gather=overlap_param_gather,
    )


def step(trainer: Trainer) -> tuple[float, float, float]:
    """Loss, gradient norm and learning rate of one update of fine-tuning on `branching_samples`."""
    report = trainer.step(branching_samples(), lambda lp, row: sft_loss(lp), branching=True)
    return report.loss, report.grad_norm, report.lr


def axes(parallel: ParallelSettings) -> dict[str, int]:
    """The sizes that `init_world` and `world_of` take."""
    return {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "cp": parallel.cp,
        "vpp": parallel.vpp,
        "ep": parallel.ep,
    }
