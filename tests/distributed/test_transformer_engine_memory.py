"""`npr plan` counts what Transformer Engine's layers keep: its real Python on the CPU (tests.fakes.te_on_cpu)."""

from __future__ import annotations

import json
from itertools import product

import pytest

from megatron_npr.planning import Layout, Workload
from megatron_npr.planning.memory import activation_bytes_per_token
from tests.fakes import te_on_cpu
from tests.support.kept import MODELS
from tests.support.launch import run_worker

RECIPES = (None, "tensorwise", "delayed", "blockwise")
CASES = list(product(MODELS, RECIPES, ("none", "selective", "full")))


def test_the_plan_counts_what_they_keep_and_their_fp8_copies_of_weights() -> None:
    te_on_cpu.skip_where_absent()
    found = json.loads(run_worker("kept", (json.dumps(CASES),), 1, through=te_on_cpu.__name__))
    for (name, recipe, recompute), kept in zip(CASES, found, strict=True):
        work = Workload(bytes_per_weight=2, fp8=recipe, recompute=recompute)
        planned, _ = activation_bytes_per_token(MODELS[name], Layout(), work)
        # Rows of experts are filled up to a multiple of 16, here those of some 190 rows each; blocks have scales.
        slack = 0.03 if recipe and name == "experts" else 0.01
        assert kept["per_token"] == pytest.approx(planned, rel=slack), (name, recipe, recompute)
        if recompute == "none":  # else backward makes the transposed ones
            assert kept["per_weight"] == pytest.approx(2 if recipe else 0, rel=0.15), (name, recipe)
