"""The activations that `npr plan` counts are those that our layers really keep for their backward pass."""

from __future__ import annotations

import pytest

from megatron_npr.config import Fp8Settings, Recompute
from megatron_npr.planning import Layout, Workload
from megatron_npr.planning.memory import activation_bytes_per_token
from megatron_npr.runtime.process_world import World
from tests.support.kept import MODELS, kept_by_a_layer


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_another_layer_keeps_as_much_as_the_plan_counts(
    name: str, fp8: bool, recompute: Recompute, world: World
) -> None:
    kept = kept_by_a_layer(MODELS[name], world, recompute=recompute, fp8=Fp8Settings() if fp8 else None)
    work = Workload(bytes_per_weight=4, modules="cpu", fp8="tensorwise" if fp8 else None, recompute=recompute)
    planned, _ = activation_bytes_per_token(MODELS[name], Layout(), work)
    assert kept.per_token == pytest.approx(planned, rel=0.005)
