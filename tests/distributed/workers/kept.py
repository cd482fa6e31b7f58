"""What Transformer Engine's layers keep: kept.py CASES OUT, where CASES is the JSON of (model, recipe, recompute).

Started by `test_transformer_engine_memory.py`; its real Python on the CPU, in bf16.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_npr.config import Fp8Settings
from megatron_npr.model.linears import TRANSFORMER_ENGINE
from megatron_npr.runtime.process_world import world_of
from tests.support.kept import MODELS, kept_by_a_layer


def main() -> None:
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    with world_of() as world:
        found = [
            asdict(
                kept_by_a_layer(
                    MODELS[name],
                    world,
                    dtype=torch.bfloat16,
                    recompute=recompute,
                    fp8=Fp8Settings(recipe=recipe) if recipe else None,
                    linears=TRANSFORMER_ENGINE,
                )
            )
            for name, recipe, recompute in cases
        ]
    out.write_text(json.dumps(found))
