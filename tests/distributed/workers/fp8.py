"""One process of a world under tensor parallelism with FP8 linear layers: fp8.py FOLDER OUT; figures as JSON.

Started by `test_fp8_tensor_parallel.py`. One world measures with and without sequence parallelism.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_npr.config import Fp8Settings, ParallelSettings
from megatron_npr.runtime.process_world import World, world_of
from tests.support.fp8 import layers as fp8_layers
from tests.support.training import new_trainer, step


def measure(world: World, folder: Path) -> dict[str, Any]:
    """Largest error of a layer on any rank; loss and gradient norm of two updates of a model."""
    figures: dict[str, Any] = {"layers": {}, "training": {}}
    for sequence_parallel in (False, True):
        for kind in fp8_layers.KINDS:
            errors = fp8_layers.errors(world, kind, "hybrid", sequence_parallel=sequence_parallel)
            largest = torch.tensor(list(errors.values()))
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            figures["layers"][f"{kind}, sequence parallel: {sequence_parallel}"] = largest.tolist()
        parallel = ParallelSettings(tp=world.tp_size, sequence_parallel=sequence_parallel)
        trainer = new_trainer(world, folder, parallel=parallel, fp8=Fp8Settings())
        figures["training"][f"sequence parallel: {sequence_parallel}"] = [step(trainer)[:2] for _ in range(2)]
    return figures


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    with world_of(tp=2) as world:
        figures = measure(world, folder)
        if world.is_main:
            out.write_text(json.dumps(figures))
        dist.barrier()


if __name__ == "__main__":
    main()
