"""One process of a run that is stopped and resumed under another layout; as JSON the figures of the two steps after that.

Started by `test_checkpoint_layouts.py`: checkpoint.py PARALLEL MODEL CHECKPOINTS OUT, where PARALLEL is the JSON of
`[parallel]`. Without a checkpoint in the folder it trains three steps and saves one; with one it resumes; then it takes two
more steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_npr.config import OptimizerSettings, ParallelSettings
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.checkpoint import Checkpoints
from tests.support.training import axes, new_trainer, step

OPTIMIZER = OptimizerSettings(lr=1e-2, schedule="cosine", warmup_steps=2)
PROGRESS = {"cursor": 18}


def figures(
    world: World, parallel: ParallelSettings, model: Path, folder: Path
) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and rate of the two steps after the checkpoint."""
    trainer = new_trainer(world, model, optimizer=OPTIMIZER, parallel=parallel)
    checkpoints = Checkpoints(folder, world, keep=2, model_folder=model, config={})
    restored = checkpoints.resume(trainer)
    if restored is None:
        for _ in range(3):
            step(trainer)
        checkpoints.save(3, trainer, PROGRESS)
    else:
        assert restored == (3, PROGRESS)
    return [step(trainer), step(trainer)]


def main() -> None:
    parallel = ParallelSettings(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    with world_of(**axes(parallel)) as world:
        found = figures(world, parallel, Path(sys.argv[2]), Path(sys.argv[3]))
        if world.is_main:
            Path(sys.argv[4]).write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main()
