"""One process of a tensor-parallel round over a model with rows behind its tokenizer; rank 0 writes what came out.

Started by `test_padded_vocabulary.py`: padded.py MODEL RUN TP OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_npr.runtime.process_world import close_world
from tests.support.padded import play_round


def main() -> None:
    model, run, tensor, out = sys.argv[1:]
    found = play_round(Path(model), Path(run), "--parallel.tp", tensor)
    if dist.get_rank() == 0:
        torch.save(found, out)
    close_world()


if __name__ == "__main__":
    main()
