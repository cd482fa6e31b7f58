"""From every training layout into every engine layout: the engine's logits are transformers' own, also after an update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.reshard_worker import GROWTH
from tests.families import save_family

WORKER = Path(__file__).with_name("reshard_worker.py")


def case(engine_tp: int, engine_ep: int = 1, **parallel: int | bool) -> dict[str, Any]:
    return {"parallel": parallel, "tp": engine_tp, "ep": engine_ep}


TWO = {
    "tp2 to tp1": case(1, tp=2),
    "pp2 to tp2": case(2, pp=2),
    "pp2 x vpp2 to tp1": case(1, pp=2, vpp=2),
    "dp2 to tp2": case(2),
    "cp2 to tp2": case(2, cp=2),
    "zero copy: tp2 to tp2": case(2, tp=2),
    "zero copy: dp2 to tp1": case(1),
}


def expected_logits(folder: Path) -> None:
    """Writes folder/expected.pt: token ids, transformers' logits, and the logits of the grown weights."""
    token_ids = torch.from_numpy(np.random.default_rng(1).integers(0, 97, 40))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = model(token_ids[None]).logits[0]
        for weight in model.parameters():
            weight.mul_(GROWTH)
        after = model(token_ids[None]).logits[0]
    torch.save((token_ids, before, after), folder / "expected.pt")


def walk(cases: dict[str, dict[str, Any]], processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of each case; one world for all."""
    expected_logits(folder)
    out = folder / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), json.dumps(list(cases.values())), str(folder), str(out)],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(out.read_text()), strict=True))


def check(figures: dict[str, dict[str, Any]]) -> None:
    for name, found in figures.items():
        assert max(found["errors"]) <= 1e-5, f"{name}: {found['errors']}"
        if name.startswith("zero copy"):
            assert found["moved"] == 0 and found["in_place"] > 0, name
        else:
            assert found["moved"] > 0 and found["in_place"] == 0, name


def test_two_processes_walk_through_dense_layouts(tmp_path: Path) -> None:
    check(walk(TWO, 2, save_family("qwen3 tied", tmp_path / "model")))
