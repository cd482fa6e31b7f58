"""Trainings with Transformer Engine's layers, and what is measured with them; imported where that is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TEGroupedLinear
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_npr.config import Fp8Settings, ParallelSettings
from megatron_npr.model import linears
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.sharding.layouts import EngineLayout
from megatron_npr.training.checkpoint import Checkpoints
from megatron_npr.training.engine_weights import EngineWeights
from megatron_npr.training.trainer import Trainer
from npr_engine.model.transformer import InferenceModel
from npr_ext import branch_layout
from tests.fakes.te_on_cpu.quantise import CALLS
from tests.support.logits.engine import engine_logits
from tests.support.training import TAGS, branching_samples, new_trainer, step
from tests.support.transformer_engine.runs import Figures, Run
from tests.support.worlds import worlds


class Bench:
    """A trainer and the figures of the updates that it did."""

    def __init__(self, run: Run, world: World) -> None:
        FP8GlobalStateManager.reset()  # it knows the layers of all trainers that this process had
        CALLS.clear()
        self.run, self.world = run, world
        self.trainer: Trainer = new_trainer(
            world,
            Path(run.model),
            parallel=ParallelSettings(**run.parallel),
            recompute=run.recompute,
            fp8=Fp8Settings(**run.fp8) if run.fp8 is not None else None,
            linears=linears.OWN if run.own_layers else linears.TRANSFORMER_ENGINE,
        )
        self.losses: list[float] = []
        self.norms: list[float] = []

    def update(self) -> None:
        loss, norm, _ = step(self.trainer)
        self.losses.append(loss)
        self.norms.append(norm)

    def checkpoints(self, folder: str) -> Checkpoints:
        return Checkpoints(Path(folder), self.world, keep=2, model_folder=Path(self.run.model), config={})

    def save(self) -> None:
        if self.run.save is not None:
            self.checkpoints(self.run.save).save(1, self.trainer, {})

    def resume(self) -> None:
        if self.run.resume is not None:
            assert self.checkpoints(self.run.resume).resume(self.trainer) == (1, {})


def train(bench: Bench) -> dict[str, Any]:
    """Updates, with a checkpoint read before them and one written after the first."""
    bench.resume()
    for number in range(bench.run.updates):
        bench.update()
        if number == 0:
            bench.save()
    return {}


def watch_log_probs(bench: Bench) -> dict[str, Any]:
    """Mean of the log-probs before each update."""
    means = []
    for _ in range(bench.run.updates):
        log_probs = np.concatenate(bench.trainer.log_probs(branching_samples(), branching=True))
        means.append(float(np.nanmean(log_probs, dtype=np.float64)))
        bench.update()
    return {"means": means}


def compare_with_engine(bench: Bench) -> dict[str, Any]:
    """Largest difference of log-probs between trainer and engine before and after an update, what the update of the engine
    copied, and whether all its weights lie in the trainer's storage."""
    policy = bench.trainer.policy
    weights = EngineWeights(policy, EngineLayout())
    engine = InferenceModel(policy.model_config, weights.tensors)
    ids = torch.arange(12, 12 + 40)
    layout = branch_layout(ids, tags=TAGS, prompt_lengths=len(ids)).as_tensor()

    def difference() -> float:
        with torch.no_grad(), megatron_context():
            ours = policy.eval().logits(ids[None], layout)[0, :, : policy.model_config.vocab_size]
        theirs = engine_logits(engine, ids)
        return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())

    differences = [difference()]
    bench.update()
    moved = weights.update()
    differences.append(difference())
    own = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    shared = [tensor.untyped_storage().data_ptr() in own for tensor in weights.tensors.values()]
    return {
        "differences": differences,
        "moved": moved.sent + moved.received + moved.copied,
        "shared": sum(shared),
        "tensors": len(shared),
    }


def mark_experts(bench: Bench) -> dict[str, Any]:
    """Write a number of its own into scale and history of every expert's quantisers, and save."""
    bench.update()
    for layer, quantisers in enumerate(_expert_quantisers(bench)):
        for (expert, kind), quantiser in quantisers.items():
            quantiser.scale.fill_(_mark(layer, expert, kind))
            quantiser.amax.fill_(-_mark(layer, expert, kind))
    bench.save()
    return {}


def read_experts(bench: Bench) -> dict[str, Any]:
    """How many quantisers of experts there are on this rank, and those whose numbers are not the ones written."""
    bench.resume()
    wrong, count = [], 0
    for layer, quantisers in enumerate(_expert_quantisers(bench)):
        for (expert, kind), quantiser in quantisers.items():
            mark = _mark(layer, expert, kind)
            count += 1
            if (quantiser.scale.item(), quantiser.amax.item()) != (mark, -mark):
                wrong.append((layer, expert, kind, quantiser.scale.item(), quantiser.amax.item()))
    return {"count": count, "wrong": wrong}


def _mark(layer: int, expert: int, kind: int) -> float:
    return float(1 + kind + 10 * (expert + 100 * layer))


def _expert_quantisers(bench: Bench) -> list[dict[tuple[int, int], Any]]:
    """For each projection of experts, by expert (of all ranks) and kind (input, weight, gradient of the output), as Transformer
    Engine itself finds them."""
    found = []
    for module in bench.trainer.policy.modules():
        if isinstance(module, TEGroupedLinear):
            inputs, weights, _, _, _, gradients = module._get_quantizers()
            first = bench.world.ep_rank * module.num_gemms
            found.append(
                {
                    (first + number, kind): each
                    for kind, group in enumerate((inputs, weights, gradients))
                    for number, each in enumerate(group)
                }
            )
    assert found
    return found


MEASUREMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    each.__name__: each for each in (train, watch_log_probs, compare_with_engine, mark_experts, read_experts)
}


def walk(runs: dict[str, Run]) -> dict[str, Figures]:
    """Figures of the runs; those that a measurement found on each rank."""
    figures = {}
    layouts = [ParallelSettings(**run.parallel) for run in runs.values()]
    for world, (name, run) in zip(worlds(layouts), runs.items(), strict=True):
        bench = Bench(run, world)
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, MEASUREMENTS[run.measure](bench))
        figures[name] = Figures(bench.losses, bench.norms, dict(CALLS), found)
    return figures
