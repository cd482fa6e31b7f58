"""Every model family under tensor and pipeline parallelism: transformers' logits, and the same bits gathered again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_worker
from tests.families import FAMILIES, save_family


def measure(folders: dict[str, Path], tensor: int, pipeline: int) -> None:
    """Start the world, and hold its figures against what they must be."""
    said = run_worker("family_worker", (tensor, pipeline, *folders.values()), tensor * pipeline)
    for name, figures in zip(folders, json.loads(said), strict=True):
        assert figures["logits_difference"] <= 1e-4, name
        assert figures["other_tensors"] == 0, f"{name}: {figures['other_tensors']} tensors came back changed"


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_tiny_models_of_all_families_under(tensor: int, pipeline: int, tmp_path: Path) -> None:
    folders = {name: save_family(name, tmp_path / name) for name in FAMILIES}
    measure(folders, tensor, pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline", [(3, 1), (1, 2)], ids=["tp3", "pp2"])
def test_smollm2_with_its_9_and_3_heads_under(tensor: int, pipeline: int, smollm2: Path) -> None:
    measure({"smollm2": smollm2}, tensor, pipeline)
