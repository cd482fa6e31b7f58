"""Every model family under tensor, pipeline and expert parallelism: transformers' logits, the same bits gathered again, and
after an update the same bits on every rank that holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.families import FAMILIES, save_family
from tests.support.launch import run_worker


def measure(folders: dict[str, Path], tp: int, pp: int, ep: int = 1) -> None:
    """Start the world, and hold its figures against what they must be."""
    processes = pp * max(tp, ep)
    said = run_worker("family", (tp, pp, ep, *folders.values()), processes)
    for name, figures in zip(folders, json.loads(said), strict=True):
        assert figures["logits_error"] <= 1, name
        assert figures["other_tensors"] == 0, f"{name}: {figures['other_tensors']} tensors came back changed"
        assert figures["strayed"] == [], f"{name}: ranks that hold the same part of a weight hold other bits"


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_tiny_models_of_all_families_under(tp: int, pp: int, tmp_path: Path) -> None:
    folders = {name: save_family(name, tmp_path / name) for name in FAMILIES}
    measure(folders, tp, pp)


def experts_under(tp: int, pp: int, folder: Path) -> None:
    folders = {name: save_family(name, folder / name) for name in FAMILIES if "moe" in name}
    measure(folders, tp, pp, ep=2)


def test_tiny_models_whose_experts_lie_on_two_ranks(tmp_path: Path) -> None:
    experts_under(1, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_tiny_models_whose_experts_lie_on_two_ranks_under(tp: int, pp: int, tmp_path: Path) -> None:
    experts_under(tp, pp, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tp, pp", [(3, 1), (1, 2)], ids=["tp3", "pp2"])
def test_smollm2_with_its_9_and_3_heads_under(tp: int, pp: int, smollm2: Path) -> None:
    measure({"smollm2": smollm2}, tp, pp)
