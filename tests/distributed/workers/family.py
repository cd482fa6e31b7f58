"""One process of a world that holds each model of a list: logits against transformers', weights gathered again.

Started by `test_model_families.py`: family.py TP PP EP FOLDER... OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_npr.config import ParallelSettings
from megatron_npr.hf.huggingface import export_tensors, read_model_config
from megatron_npr.model.policy import build_policy, load_policy_weights
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.engine_weights import full_weights
from tests.distributed.workers.parity import logits_difference


def measure(world: World, folder: Path) -> dict[str, float]:
    """Largest difference of a logit, and how many exported tensors are not the folder's bits."""
    config = read_model_config(folder)
    sharded = config.num_experts > 0 and world.tp_size > 1
    parallel = ParallelSettings(tp=world.tp_size, sequence_parallel=sharded)
    policy = build_policy(config, world, parallel=parallel).eval()
    load_policy_weights(policy, folder)
    largest = torch.tensor([logits_difference(policy, world, folder)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    ours = export_tensors(full_weights(policy), config)
    theirs = load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    other = sum(not torch.equal(weight, theirs[name]) for name, weight in ours.items())
    return {"logits_difference": float(largest), "other_tensors": other}


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
