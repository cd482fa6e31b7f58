"""The planner's picture of Megatron is Megatron's own, and the paper-scale plan is exact and quick."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
import torch
from megatron.core.parallel_state import RankGenerator
from megatron.core.resharding.planner import _determine_source_ranks_for_dst_param
from megatron.core.resharding.utils import ParameterMetadata
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import local_weights
from megatron_npr.runtime.process_world import world_of
from megatron_npr.sharding.architecture import KNOWN, Architecture
from megatron_npr.sharding.catalog import Kind, Place, catalog, engine_cut, kinds
from megatron_npr.sharding.cuts import Cut, local_shape, local_size, pieces
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, split_layers
from megatron_npr.weight_sync.plan import for_replica, plan
from npr_engine.model.architecture import is_projection
from npr_engine.model.transformer import ModelConfig


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "first", "last"),
    [
        (94, 8, 1, 11, 11),
        (94, 8, 1, 10, None),
        (24, 4, 2, 4, 4),
        (36, 2, 3, None, None),
        (12, 4, 3, None, None),
    ],
)
def test_layers_stand_where_megatron_puts_them(
    num_layers: int, pp: int, vpp: int, first: int | None, last: int | None
) -> None:
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_dtype=np.float32,
    )
    layers = split_layers(num_layers, pp=pp, vpp=vpp, first=first, last=last)
    begins = np.cumsum((0, *layers))
    for chunk in range(vpp):
        for stage in range(pp):
            offset = get_transformer_layer_offset(config, vp_stage=chunk if vpp > 1 else None, pp_rank=stage)
            assert begins[chunk * pp + stage] == offset


def test_ranks_stand_where_megatron_puts_them() -> None:
    """Megatron's own generators give the groups; ours is the same arithmetic for both grids."""
    tp, cp, dp, pp, ep, etp = 2, 2, 4, 3, 4, 2
    trainer = TrainerLayout((1, 1, 1), tp=tp, pp=pp, dp_cp=cp * dp, ep=ep, etp=etp)
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    expert = RankGenerator(
        tp=etp, ep=ep, dp=trainer.places // (ep * etp), pp=pp, cp=1, order="tp-cp-ep-dp-pp"
    )
    for group in dense.get_ranks("tp"):
        assert [rank % trainer.places % tp for rank in group] == list(range(tp))
    for group in dense.get_ranks("pp") + expert.get_ranks("pp"):
        assert [rank // trainer.places for rank in group] == list(range(pp))
    for group in expert.get_ranks("ep"):
        assert [rank % trainer.places // etp % ep for rank in group] == list(range(ep))
    for group in expert.get_ranks("tp"):
        assert [rank % trainer.places % etp for rank in group] == list(range(etp))


@pytest.mark.parametrize("tied", [True, False])
def test_the_catalog_lists_the_names_and_shapes_that_megatrons_modules_have(tied: bool) -> None:
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        ffn_hidden_size=24,
        vocab_size=33,
        qkv_bias=True,
        tied_embeddings=tied,
    )
    with world_of() as world:
        built = {
            name: tuple(weight.shape) for name, weight in local_weights(build_policy(config, world)).items()
        }
    listed = catalog(config)
    assert list(listed) == [name for name in catalog(config) if name in built] and len(listed) == len(built)
    for name, weight in listed.items():
        assert (
            local_shape(weight.kind.matrix, *weight.trainer_cut(TrainerLayout((2,)), 0)[::2]) == built[name]
        )


@pytest.mark.parametrize("name", KNOWN)
def test_what_becomes_fp8_are_the_matrices_of_layers_that_tensor_parallelism_cuts(name: str) -> None:
    for kind in kinds(KNOWN[name]):
        in_layers = kind.place in (Place.LAYER, Place.EXPERT)
        expected = in_layers and kind.matrix.columns > 1 and kind.cut is not Cut.REPLICATED
        assert is_projection(kind.pattern) == expected, kind.pattern


SHARDED = Architecture(
    num_layers=2,
    hidden_size=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=2,
    ffn_hidden_size=16,
    vocab_size=32,
    qkv_bias=True,
)


def megatron_metadata(kind: Kind, cut: Cut, size: int) -> ParameterMetadata:
    """What Megatron's own modules would say about a shard of this kind, on the first `size` ranks."""
    shape = local_shape(kind.matrix, cut, size)
    return ParameterMetadata(
        name=kind.pattern,
        shape=shape,
        dtype=torch.float32,
        element_size=4,
        is_tp=cut is not Cut.REPLICATED,
        partition_dim=int(cut is Cut.COLUMNS),
        partition_stride=2 if cut is Cut.GATE_UP else 1,
        tensor_parallel_group_ranks=list(range(size)),
        data_parallel_group_ranks=[0],
    )


@pytest.mark.parametrize(("trainer_tp", "engine_tp"), [(1, 2), (2, 1), (4, 2), (2, 8), (4, 4), (8, 2)])
def test_megatrons_own_planner_takes_every_element_from_the_same_place(
    trainer_tp: int, engine_tp: int
) -> None:
    """Its planner works on metadata once that is gathered; weights that all ranks hold may come from any of them."""
    trainer = TrainerLayout((2,), tp=trainer_tp, dp_cp=8 // trainer_tp)
    planned = plan(SHARDED, trainer, EngineLayout(engine_tp))
    compared = 0
    for kind in kinds(SHARDED):
        if kind.cut is Cut.REPLICATED:
            continue
        source = megatron_metadata(kind, kind.cut, trainer_tp)
        target = megatron_metadata(kind, kind.cut, engine_tp)
        count = local_size(kind.matrix, kind.cut, trainer_tp)
        tensor = planned.names.index(kind.name(0, 0))
        for rank in range(engine_tp):
            theirs = np.full(target.shape, -1)
            for sender, there, here in _determine_source_ranks_for_dst_param("", source, target, rank):
                theirs[here] = sender * count + np.arange(count).reshape(source.shape)[there]
            ours = np.full(local_size(kind.matrix, kind.cut, engine_tp), -1)
            routes = planned.routes[
                (planned.routes["tensor"] == tensor) & (planned.routes["destination"] == rank)
            ]
            for block in routes:
                inner = np.arange(block["row_length"])
                rows = np.arange(block["rows"])[:, None]
                here = block["destination_offset"] + rows * block["destination_stride"] + inner
                there = block["source_offset"] + rows * block["source_stride"] + inner
                ours[here] = block["shard"] * count + there
            np.testing.assert_array_equal(ours, theirs.ravel(), err_msg=kind.pattern)
            compared += 1
    assert compared == 7 * engine_tp


MODEL = KNOWN["Qwen3-235B-A22B"]
TRAINER = TrainerLayout(split_layers(94, pp=8, first=11, last=11), tp=8, pp=8, dp_cp=8, ep=8, etp=1)


@pytest.mark.parametrize(
    "engine", [EngineLayout(8, 8, 1), EngineLayout(8, 8, 8)], ids=["8 ranks", "64 ranks"]
)
def test_qwen3_235b_on_512_ranks_is_planned_quickly_and_sends_every_element_once(
    engine: EngineLayout,
) -> None:
    tracemalloc.start()
    began = time.thread_time()
    planned = plan(MODEL, TRAINER, engine)
    first = for_replica(planned, 0)
    seconds, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert TRAINER.world_size == 512 and seconds < 60 and peak < 4e9
    assert first.elements_sent + first.elements_copied + first.elements_aliased == expected_elements(engine)
    assert_intervals_are_exact(planned.routes, engine)


def expected_elements(engine: EngineLayout) -> int:
    """Elements that one replica holds: each expert once a copy of the expert grid, KV heads, router and norms on every rank."""
    dim, hidden = MODEL.head_dim, MODEL.hidden_size
    queries = MODEL.num_heads * dim * hidden * 2  # and the output projection
    attention = queries + engine.tp * (2 * dim * hidden + 2 * dim + 2 * hidden + MODEL.num_experts * hidden)
    experts = MODEL.num_experts * MODEL.expert_parameters
    attention_copies = engine.size // engine.tp
    expert_copies = engine.size // (engine.ep * engine.etp)
    outer = 2 * MODEL.vocab_size * hidden + engine.tp * hidden
    return (
        MODEL.num_layers * (attention * attention_copies + experts * expert_copies) + outer * attention_copies
    )


def assert_intervals_are_exact(routes: np.ndarray, engine: EngineLayout) -> None:
    """Intervals of all shards tile them; in every kind, in first, middle and last layer, they carry the right rows."""
    first_tensor = 0
    for kind in kinds(MODEL):
        layers = MODEL.num_layers if "{layer}" in kind.pattern else 1
        experts = MODEL.num_experts if "{expert}" in kind.pattern else 1
        last_tensor = first_tensor + layers * experts
        own = routes[(routes["tensor"] >= first_tensor) & (routes["tensor"] < last_tensor)]
        size = engine.etp if experts > 1 else engine.tp
        goal = engine_cut(kind, size)
        shards = engine.size if experts == 1 else engine.etp * (engine.size // (engine.ep * engine.etp))
        order = np.lexsort((own["destination_offset"], own["destination"], own["tensor"]))
        own = own[order]
        keys = own["tensor"].astype(np.int64) * engine.size + own["destination"]
        _, begins = np.unique(keys, return_index=True)
        assert len(begins) == layers * experts * shards, kind.pattern
        volumes = np.add.reduceat(own["rows"] * own["row_length"], begins)
        if goal is not Cut.VOCABULARY:
            assert (volumes == local_size(kind.matrix, goal, size)).all(), kind.pattern
        else:
            assert volumes.sum() == kind.matrix.rows * kind.matrix.columns * shards // size
        for layer in {0, layers // 2, layers - 1}:
            for expert in {0, experts - 1}:
                tensor = first_tensor + layer * experts + expert
                for destination in np.unique(own["destination"][own["tensor"] == tensor]):
                    blocks = own[(own["tensor"] == tensor) & (own["destination"] == destination)]
                    assert_rows(kind, goal, blocks, int(destination), engine, experts > 1)
        first_tensor = last_tensor


def assert_rows(
    kind: Kind, goal: Cut, blocks: np.ndarray, destination: int, engine: EngineLayout, of_experts: bool
) -> None:
    """Sorted runs tile the shard, and both sides of each run are the same elements of the full weight."""
    size, sources = (engine.etp, TRAINER.etp) if of_experts else (engine.tp, TRAINER.tp)
    rank = destination % size
    starts, lengths = [], []
    for block in blocks:
        rows = int(block["rows"])
        target = block["destination_offset"] + np.arange(rows) * block["destination_stride"]
        source = block["source_offset"] + np.arange(rows) * block["source_stride"]
        shard = max(int(block["shard"]) % sources if of_experts else int(block["shard"]), 0)
        here = global_numbers(kind, goal, rank, size, target)
        there = global_numbers(kind, kind.cut, shard, sources, source)
        ends_here = global_numbers(kind, goal, rank, size, target + block["row_length"] - 1)
        ends_there = global_numbers(kind, kind.cut, shard, sources, source + block["row_length"] - 1)
        np.testing.assert_array_equal(here, there)
        np.testing.assert_array_equal(ends_here, ends_there)
        starts.append(target)
        lengths.append(np.full(rows, block["row_length"]))
    order = np.argsort(np.concatenate(starts))
    begin, length = np.concatenate(starts)[order], np.concatenate(lengths)[order]
    assert begin[0] == 0
    np.testing.assert_array_equal(begin[1:], begin[:-1] + length[:-1])


def global_numbers(kind: Kind, cut: Cut, rank: int, size: int, local: np.ndarray) -> np.ndarray:
    """Numbers in the full weight of local elements, in closed form for every cut."""
    rows, columns = kind.matrix.rows, kind.matrix.columns
    if cut is Cut.COLUMNS:
        width = columns // size
        return local // width * columns + rank * width + local % width
    row, column = np.divmod(local, columns)
    if cut is Cut.ROWS:
        row = row + rank * (rows // size)
    if cut is Cut.VOCABULARY:
        row = row + rank * -(-rows // size)
    if cut is Cut.GATE_UP:
        half, count = rows // 2, rows // 2 // size
        row = row // count * half + rank * count + row % count
    if cut is Cut.KV_GROUPS:
        dim, heads, groups = MODEL.head_dim, MODEL.num_heads, MODEL.num_kv_heads
        own, per_group = heads // size, heads // groups
        head = row // dim  # own queries, then k, then v
        group = rank * groups // size
        position = np.where(head < own, rank * own % per_group + head, per_group + head - own)
        row = (group * (per_group + 2) + position) * dim + row % dim
    return row * columns + column


def test_the_pieces_of_all_ranks_tile_a_weight() -> None:
    for kind in kinds(MODEL):
        if kind.cut is not Cut.REPLICATED and "qkv" not in kind.pattern:
            area = sum(
                piece.rows * piece.columns
                for rank in range(8)
                for piece in pieces(kind.matrix, kind.cut, rank, 8)
            )
            assert area == kind.matrix.rows * kind.matrix.columns
