"""Loss, gradient norm, updates, engine weights and resume are equal under every layout (gloo, tiny model)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.families import save_family
from tests.support.launch import run_worker

Measure = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A world of processes, its [parallel] table, what backward computes again, the model ("dense" or "moe"), and whether
    gradients and weights travel beside the computation, in small buckets."""

    processes: int
    parallel: dict[str, int | bool]
    recompute: str = "none"
    model: str = "dense"
    overlap: bool = False


LAYOUTS = {
    "one process": Case(1, {}),
    "tp2": Case(2, {"tp": 2}),
    "tp2 with sequence parallelism": Case(2, {"tp": 2, "sequence_parallel": True}),
    "pp2": Case(2, {"pp": 2}),
    "pp2 x vpp2": Case(2, {"pp": 2, "vpp": 2}),
    "cp2": Case(2, {"cp": 2}),
    "dp2": Case(2, {}),
    "dp2 with overlap": Case(2, {}, overlap=True),
    "full recompute": Case(1, {}, "full"),
    "cp2 with full recompute": Case(2, {"cp": 2}, "full"),
    "experts on one process": Case(1, {}, model="moe"),
    "ep2": Case(2, {"ep": 2}, model="moe"),
}
SLOW_LAYOUTS = {
    "selective recompute": Case(1, {}, "selective"),
    "tp2 x pp2": Case(4, {"tp": 2, "pp": 2}),
    "pp2 x dp2": Case(4, {"pp": 2}),
    "pp2 x dp2 with overlap": Case(4, {"pp": 2}, overlap=True),
    "pp2 x vpp2 x dp2 with overlap": Case(4, {"pp": 2, "vpp": 2}, overlap=True),
    "tp2 x pp2 x dp2": Case(8, {"tp": 2, "pp": 2}),
    "pp2 of 3 layers and 1": Case(2, {"pp": 2, "first_layers": 3}),
    "tp2 x pp2 x vpp2": Case(4, {"tp": 2, "pp": 2, "vpp": 2}),
    "cp4": Case(4, {"cp": 4}),
    "tp2 x cp2 with sequence parallelism": Case(4, {"tp": 2, "cp": 2, "sequence_parallel": True}),
    "pp2 x cp2 with full recompute": Case(4, {"pp": 2, "cp": 2}, "full"),
    "cp2 x dp2": Case(4, {"cp": 2}),
    "tp2 x ep2 with sequence parallelism": Case(
        2, {"tp": 2, "ep": 2, "sequence_parallel": True}, model="moe"
    ),
    "experts under tp2 with sequence parallelism": Case(2, {"tp": 2, "sequence_parallel": True}, model="moe"),
    "experts under pp2 x tp2 with sequence parallelism": Case(
        4, {"pp": 2, "tp": 2, "sequence_parallel": True}, model="moe"
    ),
    "experts under tp2 x dp2 with sequence parallelism and overlap": Case(
        4, {"tp": 2, "sequence_parallel": True}, model="moe", overlap=True
    ),
    "experts under tp2 x cp2 with sequence parallelism": Case(
        4, {"tp": 2, "cp": 2, "sequence_parallel": True}, model="moe"
    ),
    "pp2 x tp2 x ep2 with sequence parallelism": Case(
        4, {"pp": 2, "tp": 2, "ep": 2, "sequence_parallel": True}, model="moe"
    ),
    "experts under dp2": Case(2, {}, model="moe"),
    "experts under pp2 x vpp2": Case(2, {"pp": 2, "vpp": 2}, model="moe"),
    "cp2 x ep2": Case(2, {"cp": 2, "ep": 2}, model="moe"),
    "ep2 with full recompute": Case(2, {"ep": 2}, "full", model="moe"),
    "ep2 with selective recompute": Case(2, {"ep": 2}, "selective", model="moe"),
    "pp2 x ep2": Case(4, {"pp": 2, "ep": 2}, model="moe"),
    "ep2 x dp2": Case(4, {"ep": 2}, model="moe"),
    "ep2 x dp2 with overlap": Case(4, {"ep": 2}, model="moe", overlap=True),
}
CASES = LAYOUTS | SLOW_LAYOUTS
REFERENCES = {"dense": "one process", "moe": "experts on one process"}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Qwen3 whose vocabulary (97) no tensor-parallel size divides."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Qwen3-MoE: three of eight experts for each token."""
    return save_family("qwen3_moe", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="session")
def folders(tiny_folder: Path, experts_folder: Path) -> dict[str, Path]:
    return {"dense": tiny_folder, "moe": experts_folder}


@pytest.fixture(scope="session")
def measure(folders: dict[str, Path]) -> Measure:
    """Figures of a layout by its name; each is measured once, for all are held against one process."""

    @cache
    def measured(name: str) -> dict[str, Any]:
        case = CASES[name]
        tables = json.dumps({"parallel": case.parallel, "recompute": case.recompute, "overlap": case.overlap})
        figures: dict[str, Any] = json.loads(
            run_worker("parity", (tables, folders[case.model]), case.processes)
        )
        return figures

    return measured


def assert_equal_figures(name: str, measure: Measure) -> None:
    reference, figures = measure(REFERENCES[CASES[name].model]), measure(name)
    assert figures["resume"] == 0.0, "a resumed run equals the uninterrupted one bit for bit"
    assert figures["strayed"] == [], "ranks that hold the same part of a weight hold the same bits"
    for key, expected in reference.items():
        if key.endswith("log_probs"):
            for ours, theirs in zip(figures[key], expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{name}: {key}")
        elif key == "logits_error":
            assert figures[key] <= 1, f"{name}: logits err {figures[key]} times as far as transformers' may"
        elif key == "entropy_difference":
            assert figures[key] <= 1e-12, f"{name}: entropy is off by {figures[key]}"
        elif key not in ("resume", "strayed"):
            np.testing.assert_allclose(figures[key], expected, rtol=1e-5, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_gradient_and_updates_equal_one_process_under(name: str, measure: Measure) -> None:
    assert_equal_figures(name, measure)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_LAYOUTS)
def test_loss_gradient_and_updates_equal_one_process_under_more(name: str, measure: Measure) -> None:
    assert_equal_figures(name, measure)


def test_shared_prompts_give_the_figures_of_unshared_ones(measure: Measure) -> None:
    figures = measure("one process")
    for objective in ("sft", "papo"):
        for figure in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                figures[f"{objective}_shared_{figure}"], figures[f"{objective}_{figure}"], rtol=1e-5
            )
    for shared, unshared in zip(figures["sft_shared_log_probs"], figures["sft_log_probs"], strict=True):
        np.testing.assert_allclose(shared, unshared, atol=1e-5)
