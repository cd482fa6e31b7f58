"""The planner against brute force: every element carries its global number, plans are carried out in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_npr.architecture import Architecture
from megatron_npr.resharding import EngineLayout, TrainerLayout, for_replica, plan, split_layers
from npr_ext.errors import UserError

Labels = NDArray[np.int64]
PADDING, UNWRITTEN = -1, -2


class Model:
    """Full weights whose elements are numbered through the whole model, and how heads and halves make them up."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = a = architecture
        self._next = 0
        self.full: dict[str, Labels] = {
            "embedding.word_embeddings.weight": self.new(a.vocab_size, a.hidden_size)
        }
        self.parts: dict[str, tuple[Labels, ...]] = {}  # heads of q, k, v [heads, H, D], or (gate, up)
        self.rows_cut: set[str] = set()
        for layer in range(a.num_layers):
            at = f"decoder.layers.{layer}."
            self.full[at + "self_attention.linear_proj.weight"] = self.new(
                a.hidden_size, a.num_heads * a.head_dim
            )
            self.qkv(at + "self_attention.linear_qkv.weight", a.hidden_size)
            if a.qkv_bias:
                self.qkv(at + "self_attention.linear_qkv.bias", 1)
            self.full[at + "self_attention.linear_qkv.layer_norm_weight"] = self.new(a.hidden_size)
            if a.qk_norm:
                self.full[at + "self_attention.q_layernorm.weight"] = self.new(a.head_dim)
                self.full[at + "self_attention.k_layernorm.weight"] = self.new(a.head_dim)
            if a.num_experts:
                self.full[at + "pre_mlp_layernorm.weight"] = self.new(a.hidden_size)
                self.full[at + "mlp.router.weight"] = self.new(a.num_experts, a.hidden_size)
                for expert in range(a.num_experts):
                    self.mlp(at + f"mlp.experts.local_experts.{expert}.")
            else:
                self.mlp(at + "mlp.")
                self.full[at + "mlp.linear_fc1.layer_norm_weight"] = self.new(a.hidden_size)
        self.full["decoder.final_layernorm.weight"] = self.new(a.hidden_size)
        if not a.tied_embeddings:
            self.full["output_layer.weight"] = self.new(a.vocab_size, a.hidden_size)

    def new(self, *shape: int) -> Labels:
        count = math.prod(shape)
        self._next += count
        return np.arange(self._next - count, self._next).reshape(shape)

    def qkv(self, name: str, columns: int) -> None:
        a = self.architecture
        counts = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
        self.parts[name] = tuple(self.new(count, a.head_dim, columns) for count in counts)

    def mlp(self, prefix: str) -> None:
        a = self.architecture
        self.parts[prefix + "linear_fc1.weight"] = (
            self.new(a.ffn_hidden_size, a.hidden_size),
            self.new(a.ffn_hidden_size, a.hidden_size),
        )
        self.full[prefix + "linear_fc2.weight"] = self.new(a.hidden_size, a.ffn_hidden_size)

    def names(self) -> set[str]:
        return {*self.full, *self.parts}

    def shard(self, name: str, rank: int, size: int, *, engine: bool) -> Labels:
        """Flat shard of `rank`, put together head by head."""
        if "linear_qkv.weight" in name or "linear_qkv.bias" in name:
            q, k, v = self.parts[name]
            if engine and size > len(k):  # own queries, and a copy of the KV head that they attend to
                queries = len(q) // size
                own = rank * len(k) // size
                return np.concatenate(
                    [q[rank * queries : (rank + 1) * queries].ravel(), k[own].ravel(), v[own].ravel()]
                )
            per_group = len(q) // len(k)
            heads = [
                head
                for group in range(len(k))
                for head in (*q[group * per_group : (group + 1) * per_group], k[group], v[group])
            ]
            return np.concatenate(heads).reshape(size, -1)[rank]
        if name in self.parts:
            return np.concatenate([half.reshape(size, -1)[rank] for half in self.parts[name]])
        full = self.full[name]
        if "embedding" in name or "output" in name:
            missing = -len(full) % size
            padded = np.concatenate([full, np.full((missing, full.shape[1]), PADDING)])
            return padded.reshape(size, -1)[rank]
        if "linear_proj" in name or "linear_fc2" in name:
            return np.split(full, size, axis=1)[rank].ravel()
        return full.ravel()


def expert_of(name: str) -> int | None:
    return int(name.split("local_experts.")[1].split(".")[0]) if "local_experts" in name else None


def trainer_shards(model: Model, layout: TrainerLayout) -> list[dict[str, Labels]]:
    """What every rank of the world holds, by walking Megatron's grid axis by axis."""
    pp_of_layer = {}
    layer = 0
    for chunk in range(len(layout.layers) // layout.pp):
        for stage in range(layout.pp):
            for _ in range(layout.layers[chunk * layout.pp + stage]):
                pp_of_layer[layer] = stage
                layer += 1
    world: list[dict[str, Labels]] = []
    for stage in range(layout.pp):
        dense_grid = [tp for _ in range(layout.data) for tp in range(layout.tp)]
        copies = layout.tp * layout.data // (layout.ep * layout.etp)
        expert_grid = [
            (ep, etp) for _ in range(copies) for ep in range(layout.ep) for etp in range(layout.etp)
        ]
        for tp, (ep, etp) in zip(dense_grid, expert_grid, strict=True):
            held = {}
            for name in model.names():
                if name.startswith("embedding"):
                    wanted = stage == 0
                elif "layers" in name:
                    wanted = pp_of_layer[int(name.split(".")[2])] == stage
                else:
                    wanted = stage == layout.pp - 1
                expert = expert_of(name)
                if expert is not None:
                    wanted = wanted and expert // (model.architecture.num_experts // layout.ep) == ep
                if wanted:
                    rank, size = (tp, layout.tp) if expert is None else (etp, layout.etp)
                    held[name] = model.shard(name, rank, size, engine=False)
            world.append(held)
    return world


def engine_shards(model: Model, layout: EngineLayout) -> list[dict[str, Labels]]:
    replica = []
    for rank in range(layout.size):
        held = {}
        for name in model.names():
            expert = expert_of(name)
            if expert is None:
                held[name] = model.shard(name, rank % layout.tp, layout.tp, engine=True)
            elif expert // (model.architecture.num_experts // layout.ep) == rank // layout.etp % layout.ep:
                held[name] = model.shard(name, rank % layout.etp, layout.etp, engine=True)
        replica.append(held)
    return replica


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
        aliased: dict[int, set[str]] = {}
        for rank, tensor in found.aliases.tolist():
            aliased.setdefault(rank, set()).add(planned.names[tensor])
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
        for offset, (held, wanted) in enumerate(zip(received, goal, strict=True)):
            rank = replica * engine.size + offset
            for name, labels in wanted.items():
                if name in aliased.get(rank, set()):
                    assert (held[name] == UNWRITTEN).all()
                    np.testing.assert_array_equal(sources[rank][name], labels, err_msg=name)
                else:
                    written = np.where(held[name] == UNWRITTEN, PADDING, held[name])
                    np.testing.assert_array_equal(written, labels, err_msg=name)


DENSE = Architecture(
    num_layers=4,
    hidden_size=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=2,
    ffn_hidden_size=8,
    vocab_size=13,
    qkv_bias=True,
    tied_embeddings=True,
)
MOE = Architecture(
    num_layers=5,
    hidden_size=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=2,
    ffn_hidden_size=4,
    vocab_size=11,
    num_experts=4,
    experts_per_token=2,
)


@pytest.mark.parametrize(
    ("architecture", "trainer", "engine"),
    [
        (DENSE, TrainerLayout((4,)), EngineLayout()),
        (DENSE, TrainerLayout((4,), tp=4), EngineLayout(2)),
        (DENSE, TrainerLayout((1, 1, 1, 1), tp=2, pp=2, data=2), EngineLayout(8)),
        (DENSE, TrainerLayout((4,), tp=8), EngineLayout(8)),
        (MOE, TrainerLayout((2, 1, 1, 1), tp=2, pp=2, data=2, ep=4), EngineLayout(4, 4)),
        (MOE, TrainerLayout((3, 2), tp=4, pp=2, ep=2, etp=2), EngineLayout(2, 2, 2)),
        (MOE, TrainerLayout((5,), tp=1, data=4, ep=2), EngineLayout(1, 4)),
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
    tp, data, engine_tp = draw(sizes), draw(st.sampled_from((1, 2))), draw(sizes)
    ep = etp = engine_ep = engine_etp = 1
    if experts:
        ep, etp, engine_ep, engine_etp = (draw(sizes) for _ in range(4))
    assume(tp * data % (ep * etp) == 0)
    trainer = TrainerLayout(layers, tp=tp, pp=pp, data=data, ep=ep, etp=etp)
    engine = EngineLayout(engine_tp, engine_ep, engine_etp)
    assume(trainer.world_size % engine.size == 0)
    return architecture, trainer, engine


@settings(deadline=None, max_examples=60)
@given(cases())
def test_any_layouts_reshard_exactly(case: tuple[Architecture, TrainerLayout, EngineLayout]) -> None:
    assert_exact(*case)


@pytest.mark.parametrize("architecture", [DENSE, MOE])
@pytest.mark.parametrize(("tp", "data"), [(1, 1), (2, 2), (1, 4)])
def test_equal_layouts_move_nothing(architecture: Architecture, tp: int, data: int) -> None:
    ep = tp if architecture.num_experts else 1
    trainer = TrainerLayout((architecture.num_layers,), tp=tp, data=data, ep=ep)
    planned = plan(architecture, trainer, EngineLayout(tp, ep))
    for replica in range(data):
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
        ((MOE, TrainerLayout((5,), data=3, ep=3), EngineLayout()), "ep 3 x etp 1 does not fit 4 experts"),
    ):
        with pytest.raises(UserError, match=message):
            plan(*bad)
    with pytest.raises(UserError, match="replica 2 does not exist"):
        for_replica(plan(DENSE, trainer, EngineLayout()), 2)
    with pytest.raises(UserError, match="94 layers of the middle stages do not divide into 8"):
        split_layers(94, pp=8)
