"""Every model family under tensor and pipeline parallelism: transformers' logits, and the same bits gathered again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import FAMILIES, save_family

WORKER = Path(__file__).with_name("family_worker.py")


def measure(folders: dict[str, Path], tensor: int, pipeline: int, out: Path) -> None:
    """Start the world, and hold its figures against what they must be."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={tensor * pipeline}", str(WORKER), str(tensor), str(pipeline), str(out)]
    done = subprocess.run(
        [*command, *map(str, folders.values())],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, figures in zip(folders, json.loads(out.read_text()), strict=True):
        assert figures["logits_difference"] <= 1e-4, name
        assert figures["other_tensors"] == 0, f"{name}: {figures['other_tensors']} tensors came back changed"


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_tiny_models_of_all_families_under(tensor: int, pipeline: int, tmp_path: Path) -> None:
    folders = {name: save_family(name, tmp_path / name) for name in FAMILIES}
    measure(folders, tensor, pipeline, tmp_path / "figures.json")


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline", [(3, 1), (1, 2)], ids=["tp3", "pp2"])
def test_smollm2_with_its_9_and_3_heads_under(
    tensor: int, pipeline: int, smollm2: Path, tmp_path: Path
) -> None:
    measure({"smollm2": smollm2}, tensor, pipeline, tmp_path / "figures.json")
