"""From every training layout into every engine layout: the engine's logits are transformers' own, also after an update."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.workers.reshard import GROWTH
from tests.support.errors import allowed_error
from tests.support.families import save_family
from tests.support.launch import run_worker
from tests.support.logits.transformers import exact_logits, transformers_logits


def case(engine_tp: int, engine_ep: int = 1, *, fp8: bool = False, **parallel: int | bool) -> dict[str, Any]:
    return {"parallel": parallel, "tp": engine_tp, "ep": engine_ep, "fp8": fp8}


TWO = {
    "tp2 to tp1": case(1, tp=2, fp8=True),
    "pp2 to tp2": case(2, pp=2, fp8=True),
    "pp2 x vpp2 to tp1": case(1, pp=2, vpp=2),
    "dp2 to tp2": case(2, fp8=True),
    "cp2 to tp2": case(2, cp=2),
    "zero copy: tp2 to tp2": case(2, tp=2, fp8=True),
    "zero copy: dp2 to tp1": case(1),
}


EXPERTS = {
    "ep2 to tp1": case(1, ep=2),
    "ep2 to tp2": case(2, ep=2),
    "pp2 to tp2 x ep2": case(2, 2, pp=2, fp8=True),
    "zero copy: tp2 x ep2 to tp2 x ep2": case(2, 2, tp=2, ep=2, sequence_parallel=True),
    "tp2 x ep2 to tp1 x ep2": case(1, 2, tp=2, ep=2, sequence_parallel=True),
    "zero copy: ep2 to tp1 x ep2": case(1, 2, ep=2),
}


def everything(experts: bool) -> dict[str, dict[str, Any]]:
    """Eight processes: {TP 1, 2, 4} x {PP 1, 2} x {VPP 1, 2} x {EP 1, 2} into engine TP {1, 2, 4}, whole and cut experts."""
    cases = {}
    sizes = (1, 2) if experts else (1,)
    for tp, (pp, vpp), ep, engine_tp, engine_ep in itertools.product(
        (1, 2, 4), ((1, 1), (2, 1), (2, 2)), sizes, (1, 2, 4), sizes
    ):
        # In place: the same cut of attention, all layers, and whole experts that the rank trains.
        alike = engine_tp == tp and pp == 1
        if experts:
            alike = alike and engine_ep >= engine_tp and ep in (1, engine_ep)
        name = f"{'zero copy: ' if alike else ''}tp{tp} pp{pp} vpp{vpp} ep{ep} to tp{engine_tp} ep{engine_ep}"
        cases[name] = case(
            engine_tp, engine_ep, tp=tp, pp=pp, vpp=vpp, ep=ep, sequence_parallel=experts and tp > 1
        )
    return cases


def expected_logits(folder: Path) -> None:
    """Writes folder/expected.pt: token ids; the exact logits and what an engine's may err, of these and of grown weights."""
    token_ids = torch.from_numpy(np.random.default_rng(1).integers(0, 97, 40))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(GROWTH)
    model.save_pretrained(folder / "grown")
    truths = []
    for each in (folder, folder / "grown"):
        exact = exact_logits(each, token_ids)
        truths.append((exact, allowed_error(transformers_logits(each, token_ids), exact)))
    torch.save((token_ids, *truths), folder / "expected.pt")


def walk(cases: dict[str, dict[str, Any]], processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of each case; one world for all."""
    expected_logits(folder)
    said = run_worker("reshard", (json.dumps(list(cases.values())), folder), processes)
    return dict(zip(cases, json.loads(said), strict=True))


def check(figures: dict[str, dict[str, Any]]) -> None:
    for name, found in figures.items():
        assert found["fp8_difference"] == 0.0 and found["moved_in_fp8"] <= 0.45 * found["moved"], name
        assert max(found["errors"]) <= 1, f"{name}: {found['errors']}"
        if name.startswith("zero copy"):
            assert found["moved"] == 0 and found["in_place"] > 0, name
        else:
            assert found["moved"] > 0 and found["in_place"] == 0, name


def test_two_processes_walk_through_dense_layouts(tmp_path: Path) -> None:
    check(walk(TWO, 2, save_family("qwen3 tied", tmp_path / "model")))


def test_two_processes_walk_through_layouts_of_experts(tmp_path: Path) -> None:
    check(walk(EXPERTS, 2, save_family("qwen3_moe", tmp_path / "model")))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_eight_processes_walk_through_every_layout(experts: bool, tmp_path: Path) -> None:
    family = "qwen3_moe" if experts else "qwen3 untied"
    check(walk(everything(experts), 8, save_family(family, tmp_path / "model", num_key_value_heads=4)))
