"""One process of a world that holds each model of a list: logits against transformers', weights gathered again,
their copies after an update.

Started by `test_model_families.py`: family.py TP PP EP FOLDER... OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_npr.config import ParallelSettings
from megatron_npr.hf.huggingface import export_tensors, read_model_config
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.engine_weights import full_weights
from tests.distributed.workers.parity import logits_error, strayed
from tests.support.training import new_trainer, step


def measure(world: World, folder: Path) -> dict[str, Any]:
    """The largest error of a logit, as a part of what is allowed, how many exported tensors are not the folder's bits, and
    weights whose copies differ after an update."""
    config = read_model_config(folder)
    sharded = config.num_experts > 0 and world.tp_size > 1
    parallel = ParallelSettings(tp=world.tp_size, sequence_parallel=sharded)
    policy = build_policy(config, world, parallel=parallel).eval()
    load_policy_weights(policy, folder)
    error = logits_error(policy, world, folder)
    ours = export_tensors(full_weights(policy), config)
    theirs = load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    other = sum(not torch.equal(weight, theirs[name]) for name, weight in ours.items())
    trainer = new_trainer(world, folder, parallel=parallel)
    step(trainer)
    strays = strayed(trainer.policy, world)
    return {"logits_error": error, "other_tensors": other, "strayed": strays}


def main() -> None:
    """Measure all folders in one world and write rank 0's figures."""
    torch.set_num_threads(1)
    tp, pp, ep = map(int, sys.argv[1:4])
    with world_of(tp=tp, pp=pp, ep=ep) as world:
        figures = [measure(world, Path(folder)) for folder in sys.argv[4:-1]]
        if world.is_main:
            Path(sys.argv[-1]).write_text(json.dumps(figures))
        dist.barrier()


if __name__ == "__main__":
    main()
