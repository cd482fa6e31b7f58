"""One process of a run: two updates and a checkpoint, or that checkpoint under another layout; then two updates, as JSON.

Started by `test_resume_elsewhere.py` through torchrun: resume_worker.py save|load PARALLEL FOLDER CHECKPOINTS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_npr.checkpoint import Checkpoints
from megatron_npr.config import BatchSettings, OptimizerSettings, ParallelSettings
from megatron_npr.huggingface import read_model_config
from megatron_npr.losses import sft_loss
from megatron_npr.parallel import world_of
from megatron_npr.policy import build_policy, load_policy_weights
from megatron_npr.trainer import Trainer
from tests.distributed.parity_worker import TAGS, branching_samples


def main() -> None:
    saves, parallel = sys.argv[1] == "save", ParallelSettings(**json.loads(sys.argv[2]))
    folder, place, out = map(Path, sys.argv[3:6])
    torch.set_num_threads(1)
    with world_of(
        tensor=parallel.tp, pipeline=parallel.pp, virtual=parallel.vpp, expert=parallel.ep
    ) as world:
        policy = build_policy(read_model_config(folder), world, parallel=parallel)
        load_policy_weights(policy, folder)
        trainer = Trainer(
            policy,
            world,
            optimizer=OptimizerSettings(lr=1e-3, schedule="linear", warmup_steps=2),
            batch=BatchSettings(micro_batch_tokens=128),
            tags=TAGS,
            pad_id=0,
            num_updates=10,
        )

        def two_steps() -> list[list[float]]:
            reports = [
                trainer.step(branching_samples(), lambda lp, row: sft_loss(lp), branching=True)
                for _ in range(2)
            ]
            return [[report.loss, report.grad_norm, report.lr] for report in reports]

        checkpoints = Checkpoints(place, world, keep=1)
        if saves:
            two_steps()
            checkpoints.save(2, trainer, {})
        else:
            path = checkpoints.latest()
            assert path is not None
            checkpoints.load(path, trainer)
        figures = two_steps()
        if world.is_main:
            out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
