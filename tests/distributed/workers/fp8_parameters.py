"""One process of a world whose weights are held in FP8: fp8_parameters.py LAYOUT FOLDER OUT; figures as JSON.

Started by `test_fp8_parameters.py`. One world measures under every recipe.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_npr.config import Fp8Settings, OptimizerSettings, ParallelSettings
from megatron_npr.model.fp8_parameters import PlainWeights
from megatron_npr.model.linears import TRANSFORMER_ENGINE
from megatron_npr.model.policy_weights import local_weights
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.sharding.layouts import EngineLayout
from megatron_npr.training.checkpoint import Checkpoints
from megatron_npr.training.engine_weights import EngineWeights
from megatron_npr.training.trainer import Trainer
from tests.support.training import axes, new_trainer, step

RECIPES = ("tensorwise", "delayed", "blockwise")
LAYOUTS = {
    "alone": ParallelSettings(),
    "DP2": ParallelSettings(),
    "TP2": ParallelSettings(tp=2),
    "EP2": ParallelSettings(ep=2),
}


OVERLAPPED: dict[str, Any] = {
    "optimizer": OptimizerSettings(lr=1e-2, overlap=True, bucket_size=20_000),
    "overlap_param_gather": True,
}


def train(
    world: World, folder: Path, recipe: str, *, parameters: bool, parallel: ParallelSettings, **options: Any
) -> Trainer:
    fp8 = Fp8Settings.model_validate({"recipe": recipe, "parameters": parameters})
    return new_trainer(
        world,
        folder,
        dtype=torch.bfloat16,
        fp8=fp8,
        parallel=parallel,
        linears=TRANSFORMER_ENGINE,
        **options,
    )


def master_weights(trainer: Trainer) -> list[torch.Tensor]:
    return [part.main_param.clone() for part in trainer.policy.parameters() if part.main_param is not None]


def reads_anew(trainer: Trainer) -> bool:
    """The weight that was read last is read again after an update."""
    weights = local_weights(trainer.policy)
    read = PlainWeights(weights)
    name = next(name for name in weights if name.endswith("linear_fc2.weight"))
    before = read[name].clone()
    step(trainer)
    kept = read[name]
    read.forget()
    return torch.equal(kept, before) and not torch.equal(read[name], before)


def measure(world: World, folder: Path, recipe: str, parallel: ParallelSettings) -> dict[str, Any]:
    """What becomes of one model: where its training begins and goes, what its engine has, how it resumes."""
    plain = train(world, folder, recipe, parameters=False, parallel=parallel)
    trainer = train(world, folder, recipe, parameters=True, parallel=parallel)
    found: dict[str, Any] = {
        "kinds": sorted({type(weight).__name__ for weight in trainer.policy.parameters()}),
        "begins": all(
            torch.equal(one, other)
            for one, other in zip(master_weights(plain), master_weights(trainer), strict=True)
        ),
        "plain": [step(plain)[:2] for _ in range(3)],
        "steps": [step(trainer)[:2]],
    }
    engine = EngineWeights(trainer.policy, EngineLayout(tp=parallel.tp))
    found["reads anew"] = reads_anew(trainer)
    found["steps"] += [step(trainer)[:2]]
    exchanged = engine.update()
    found["in place"], found["moved"] = exchanged.in_place, exchanged.copied + exchanged.received
    if world.size == 1:
        read = local_weights(trainer.policy)
        found["engine"] = all(
            torch.equal(weight.view(-1), read[name].float().bfloat16().view(-1))
            for name, weight in engine.tensors.items()
        )
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        checkpoints = Checkpoints(Path(shared[0]), world, keep=1, model_folder=folder, config={})
        checkpoints.save(3, trainer, {})
        found["uninterrupted"] = step(trainer)
        for name, parameters in (("resumed", True), ("resumed without", False)):
            other = train(world, folder, recipe, parameters=parameters, parallel=parallel)
            checkpoints.resume(other)
            found[name] = step(other)
        dist.barrier()
    if world.dp_size > 1:
        # Last: Transformer Engine reduces the largest values of all models of a process together.
        overlapped = train(world, folder, recipe, parameters=True, parallel=parallel, **OVERLAPPED)
        losses = [step(overlapped)[:2] for _ in range(3)]
        found["overlapped"] = [losses[0], losses[2]]
    return found


def main() -> None:
    layout, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    with world_of(**axes(LAYOUTS[layout])) as world:
        found = {recipe: measure(world, folder, recipe, LAYOUTS[layout]) for recipe in RECIPES}
        if world.is_main:
            out.write_text(json.dumps(found))
        dist.barrier()
