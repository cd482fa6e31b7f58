"""One process of a run that is stopped and resumed under another layout; the losses after that as JSON from rank 0.

Started by `test_checkpoint_layouts.py` through torchrun: checkpoint_worker.py TP PP FOLDER OUT. Without a checkpoint in the
folder it trains three steps and saves one; with one it resumes; then it takes two more steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parity_worker import TAGS, branching_samples

from megatron_npr.checkpoint import Checkpoints
from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.huggingface import read_model_config
from megatron_npr.losses import sft_loss
from megatron_npr.parallel import World, world_of
from megatron_npr.policy import build_policy, load_policy_weights
from megatron_npr.trainer import Trainer


def losses(world: World, folder: Path) -> list[float]:
    """Of the two steps after the checkpoint."""
    policy = build_policy(read_model_config(folder), world)
    load_policy_weights(policy, folder)
    trainer = Trainer(
        policy,
        world,
        optimizer=OptimizerSettings(lr=1e-2, schedule="cosine", warmup_steps=2),
        batch=BatchSettings(micro_batch_tokens=128),
        tags=TAGS,
        pad_id=0,
        num_updates=10,
    )
    checkpoints = Checkpoints(folder / "checkpoints", world, keep=2, model_folder=folder, config={})

    def step() -> float:
        samples = branching_samples()
        return trainer.step(samples, lambda lp, row: sft_loss(lp), branching=True).loss

    restored = checkpoints.resume(trainer)
    if restored is None:
        for _ in range(3):
            step()
        checkpoints.save(3, trainer, {"cursor": 18})
    else:
        assert restored == (3, {"cursor": 18})
    return [step(), step()]


def main() -> None:
    """Train in one world and write rank 0's figures."""
    torch.set_num_threads(1)
    with world_of(tensor=int(sys.argv[1]), pipeline=int(sys.argv[2])) as world:
        figures = losses(world, Path(sys.argv[3]))
        if world.is_main:
            Path(sys.argv[4]).write_text(json.dumps(figures))
        dist.barrier()


if __name__ == "__main__":
    main()
