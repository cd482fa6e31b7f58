"""The planner against brute force: every element carries its global number, plans are carried out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, split_layers
from megatron_npr.weight_sync.plan import for_replica, plan
from npr_ext.errors import UserError
from tests.support.resharding_model import DENSE, MOE, PADDING, Labels, Model, engine_shards, trainer_shards

UNWRITTEN = -2


def block_elements(block: Any, side: str) -> Labels:
    starts = block[f"{side}_offset"] + np.arange(block["rows"]) * block[f"{side}_stride"]
    return (starts[:, None] + np.arange(block["row_length"])).ravel()


def assert_exact(architecture: Architecture, trainer: TrainerLayout, engine: EngineLayout) -> None:
    """Every element of every rank of every replica comes once, from a rank that holds it, with the right number."""
    model = Model(architecture)
    sources, goal = trainer_shards(model, trainer), engine_shards(model, engine)
    planned = plan(architecture, trainer, engine)
    assert set(planned.names) == model.names() and len(planned.names) == len(model.names())
    for replica in range(planned.num_replicas):
        found = for_replica(planned, replica)
        received = [{name: np.full(len(labels), UNWRITTEN) for name, labels in rank.items()} for rank in goal]
        moved = 0
        for block in found.transfers:
            name = planned.names[block["tensor"]]
            target = received[block["destination"] - replica * engine.size][name]
            places = block_elements(block, "destination")
            assert (target[places] == UNWRITTEN).all(), "an element is written twice"
            target[places] = sources[block["source"]][name][block_elements(block, "source")]
            moved += len(places)
        assert moved == found.elements_sent + found.elements_copied
        read_in_place = 0
        for offset, (held, wanted) in enumerate(zip(received, goal, strict=True)):
            rank = replica * engine.size + offset
            for name, labels in wanted.items():
                if (held[name] == UNWRITTEN).all() and (labels != PADDING).any():
                    np.testing.assert_array_equal(sources[rank][name], labels, err_msg=name)
                    read_in_place += int((labels != PADDING).sum())
                else:
                    written = np.where(held[name] == UNWRITTEN, PADDING, held[name])
                    np.testing.assert_array_equal(written, labels, err_msg=name)
        assert read_in_place == found.elements_aliased


@pytest.mark.parametrize(
    ("architecture", "trainer", "engine"),
    [
        (DENSE, TrainerLayout((4,)), EngineLayout()),
        (DENSE, TrainerLayout((4,), tp=4), EngineLayout(2)),
        (DENSE, TrainerLayout((1, 1, 1, 1), tp=2, pp=2, dp_cp=2), EngineLayout(8)),
        (DENSE, TrainerLayout((4,), tp=8), EngineLayout(8)),
        (MOE, TrainerLayout((2, 1, 1, 1), tp=2, pp=2, dp_cp=2, ep=4), EngineLayout(4, 4)),
        (MOE, TrainerLayout((3, 2), tp=4, pp=2, ep=2, etp=2), EngineLayout(2, 2, 2)),
        (MOE, TrainerLayout((5,), tp=1, dp_cp=4, ep=2), EngineLayout(1, 4)),
    ],
)
def test_every_element_arrives_once_from_its_holder(
    architecture: Architecture, trainer: TrainerLayout, engine: EngineLayout
) -> None:
    assert_exact(architecture, trainer, engine)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, TrainerLayout, EngineLayout]:
    sizes = st.sampled_from((1, 2, 4))
    groups, experts = draw(sizes), draw(st.sampled_from((0, 4)))
    pp, vpp = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2)))
    layers = tuple(draw(st.lists(st.integers(0, 2), min_size=pp * vpp, max_size=pp * vpp)))
    assume(sum(layers) > 0)
    architecture = Architecture(
        num_layers=sum(layers),
        hidden_size=draw(st.integers(1, 5)),
        num_heads=4 * draw(st.sampled_from((1, 2))),
        num_kv_heads=groups,
        head_dim=2 * draw(st.sampled_from((1, 2))),
        ffn_hidden_size=4 * draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(1, 9)),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        num_experts=experts,
        experts_per_token=min(experts, 2),
    )
    tp, dp_cp, engine_tp = draw(sizes), draw(st.sampled_from((1, 2))), draw(sizes)
    ep = etp = engine_ep = engine_etp = 1
    if experts:
        ep, etp, engine_ep, engine_etp = (draw(sizes) for _ in range(4))
    assume(tp * dp_cp % (ep * etp) == 0)
    trainer = TrainerLayout(layers, tp=tp, pp=pp, dp_cp=dp_cp, ep=ep, etp=etp)
    engine = EngineLayout(engine_tp, engine_ep, engine_etp)
    assume(trainer.world_size % engine.size == 0)
    return architecture, trainer, engine


@settings(deadline=None, max_examples=60)
@given(cases())
def test_any_layouts_reshard_exactly(case: tuple[Architecture, TrainerLayout, EngineLayout]) -> None:
    assert_exact(*case)


@pytest.mark.parametrize("architecture", [DENSE, MOE])
@pytest.mark.parametrize(("tp", "dp_cp"), [(1, 1), (2, 2), (1, 4)])
def test_equal_layouts_move_nothing(architecture: Architecture, tp: int, dp_cp: int) -> None:
    ep = tp if architecture.num_experts else 1
    trainer = TrainerLayout((architecture.num_layers,), tp=tp, dp_cp=dp_cp, ep=ep)
    planned = plan(architecture, trainer, EngineLayout(tp, ep))
    for replica in range(dp_cp):
        found = for_replica(planned, replica)
        assert len(found.transfers) == 0 and found.elements_sent == 0
        assert found.elements_aliased >= architecture.num_parameters


def test_layouts_that_do_not_fit_are_refused_in_one_line() -> None:
    trainer = TrainerLayout((4,), tp=2)
    for bad, message in (
        ((DENSE, TrainerLayout((3,)), EngineLayout()), "stages hold 3 layers, the model has 4"),
        ((DENSE, trainer, EngineLayout(4)), "replicas of 4 ranks do not fill a world of 2"),
        ((DENSE, trainer, EngineLayout(1, 2)), "the model has no experts"),
        ((DENSE, TrainerLayout((4,), tp=3), EngineLayout()), "trainer tp 3 does not fit 8 heads"),
        ((MOE, TrainerLayout((5,), dp_cp=3, ep=3), EngineLayout()), "ep 3 x etp 1 does not fit 4 experts"),
    ):
        with pytest.raises(UserError, match=message):
            plan(*bad)
    with pytest.raises(UserError, match="replica 2 does not exist"):
        for_replica(plan(DENSE, trainer, EngineLayout()), 2)
    with pytest.raises(UserError, match="94 layers of the middle stages do not divide into 8"):
        split_layers(94, pp=8)
