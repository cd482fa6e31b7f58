"""One process of two pipeline stages that load a folder with a damaged tensor in a layer of the last stage: what each is told.

Started by `test_damaged_weights.py`: damaged.py FOLDER OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.runtime.process_world import world_of
from npr_ext.errors import UserError


def main() -> None:
    torch.set_num_threads(1)
    folder, out = map(Path, sys.argv[1:])
    with world_of(pp=2) as world:
        said: list[str | None] = [None, None]
        try:
            load_policy_weights(build_policy(read_model_config(folder), world), folder)
            line = None
        except UserError as error:
            line = str(error)
        dist.all_gather_object(said, line)
        if world.is_main:
            out.write_text(json.dumps(said))
        dist.barrier()


if __name__ == "__main__":
    main()
