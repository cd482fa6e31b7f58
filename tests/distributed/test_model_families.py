"""Every model family under tensor, pipeline and expert parallelism: transformers' logits, the same bits gathered again, and
after an update the same bits on every rank that holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_worker
from tests.families import FAMILIES, save_family


def measure(folders: dict[str, Path], tensor: int, pipeline: int, expert: int = 1) -> None:
    """Start the world, and hold its figures against what they must be."""
    processes = pipeline * max(tensor, expert)
    said = run_worker("family_worker", (tensor, pipeline, expert, *folders.values()), processes)
    for name, figures in zip(folders, json.loads(said), strict=True):
        assert figures["logits_error"] <= 1, name
        assert figures["other_tensors"] == 0, f"{name}: {figures['other_tensors']} tensors came back changed"
        assert figures["strayed"] == [], f"{name}: ranks that hold the same part of a weight hold other bits"


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_tiny_models_of_all_families_under(tensor: int, pipeline: int, tmp_path: Path) -> None:
    folders = {name: save_family(name, tmp_path / name) for name in FAMILIES}
    measure(folders, tensor, pipeline)


def experts_under(tensor: int, pipeline: int, folder: Path) -> None:
    folders = {name: save_family(name, folder / name) for name in FAMILIES if "moe" in name}
    measure(folders, tensor, pipeline, expert=2)


def test_tiny_models_whose_experts_lie_on_two_ranks(tmp_path: Path) -> None:
    experts_under(1, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_tiny_models_whose_experts_lie_on_two_ranks_under(tensor: int, pipeline: int, tmp_path: Path) -> None:
    experts_under(tensor, pipeline, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline", [(3, 1), (1, 2)], ids=["tp3", "pp2"])
def test_smollm2_with_its_9_and_3_heads_under(tensor: int, pipeline: int, smollm2: Path) -> None:
    measure({"smollm2": smollm2}, tensor, pipeline)
