"""One process of a world that trains with Transformer Engine's layers: te.py RUNS OUT, RUNS as JSON of `runs.Run`.

Started by `test_transformer_engine.py`. It takes seconds to import all this, so one world takes many runs, layout after layout.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tests.support.transformer_engine.bench import walk
from tests.support.transformer_engine.runs import Run


def main() -> None:
    torch.set_num_threads(1)
    figures = walk({name: Run(**fields) for name, fields in json.loads(sys.argv[1]).items()})
    if int(os.environ["RANK"]) == 0:
        Path(sys.argv[2]).write_text(json.dumps({name: asdict(each) for name, each in figures.items()}))
