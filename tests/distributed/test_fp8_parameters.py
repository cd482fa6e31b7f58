"""Weights held in FP8 by Transformer Engine: training, the engine's share of them, checkpoints; its real Python on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import te_on_cpu
from tests.support.families import save_family
from tests.support.launch import run_worker

CASES = {
    "alone": ("qwen3 tied", 1),
    "alone, experts": ("qwen3_moe", 1),
    "DP2": ("qwen3 tied", 2),
    "TP2": ("qwen3 tied", 2),
    "EP2, experts": ("qwen3_moe", 2),
}


@pytest.mark.parametrize(
    "name", ["alone", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "alone")]
)
def test_weights_in_fp8_learn_reach_the_engine_and_resume(name: str, tmp_path: Path) -> None:
    te_on_cpu.skip_where_absent()
    family, size = CASES[name]
    arguments = (name.split(",")[0], save_family(family, tmp_path))
    found = json.loads(run_worker("fp8_parameters", arguments, size, through=te_on_cpu.__name__))
    assert set(found) == {"tensorwise", "delayed", "blockwise"}
    for recipe, figures in found.items():
        check(figures, size, "Float8BlockwiseQTensor" if recipe == "blockwise" else "Float8Tensor")


def check(figures: dict[str, Any], size: int, kind: str) -> None:
    assert figures["kinds"] == [kind, "Parameter"]
    if size == 1:  # two ranks cut them at other places
        assert figures["begins"], "the optimizer did not begin with the unrounded weights"
        assert figures["engine"], "the engine has other numbers than the policy computes with"
    assert figures["reads anew"]
    assert figures["in place"] == 0 and figures["moved"] > 0
    # FP8's noise: a model of random weights is far more sensitive to it than one that was trained.
    first, last = (figures["steps"][number][0] for number in (0, -1))
    assert first == pytest.approx(figures["plain"][0][0], rel=0.02)
    assert last == pytest.approx(figures["plain"][-1][0], rel=0.08) and last < 0.75 * first
    for ours, theirs in zip(figures.get("overlapped", ()), figures["steps"]):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert figures["resumed"] == figures["uninterrupted"]
    loss, norm, lr = figures["uninterrupted"]
    assert figures["resumed without"] == [
        pytest.approx(loss, rel=1e-6),
        pytest.approx(norm, rel=1e-5),
        lr,
    ]
