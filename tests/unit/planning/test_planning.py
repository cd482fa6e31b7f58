"""`npr plan`: memory against closed forms, ready configurations, and what does not fit."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_npr.bench.cpu import plan as memory_bench
from megatron_npr.cli import main
from megatron_npr.config import ParallelSettings, RolloutSettings, Stage3Config, load_config
from megatron_npr.planning import CLUSTER_GPUS, Cluster, Layout, Workload, best, evaluate, memory_of
from megatron_npr.planning.memory import engine_parameters, kv_bytes_per_token, parameters_of
from megatron_npr.planning.search import candidates
from megatron_npr.planning.times import train_flops
from megatron_npr.rollout.engine_groups import engine_layout
from megatron_npr.runtime.process_world import check_sizes
from megatron_npr.sharding.architecture import KNOWN
from megatron_npr.sharding.catalog import catalog
from megatron_npr.sharding.cuts import local_size
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, split_layers
from megatron_npr.weight_sync.plan import for_replica, plan
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError
from tests.support.places import CONFIGS

READY = {
    "stage1.toml": [],
    "stage2.toml": [],
    "stage3.toml": [],
    "4b-1gpu/stage3.toml": ["--gpus-per-node", "1", "--gpu", "H200"],
    "14b-4node/stage3.toml": ["--nodes", "4"],
    "32b-4node/stage3.toml": ["--nodes", "4"],
    "30b-a3b-4node/stage3.toml": ["--nodes", "4"],
    "235b-a22b-32node/stage3.toml": ["--nodes", "32"],
}


@pytest.mark.parametrize("name", READY)
def test_a_ready_configuration_fits_its_machines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / name
    words = ["plan", "--config", str(path), *READY[name]]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["memory"]["total"] < plan["memory"]["limit"]
    assert plan["seconds"]["train"] > 0
    assert (plan["seconds"]["rollout"] > 0) == ("stage2" not in name)
    assert " ".join(["npr", *words[:2], f"configs/{name}", *READY[name]]) in path.read_text()


def test_a_job_that_cannot_fit_names_the_largest_part_and_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "Qwen3-235B-A22B", "--nodes", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "largest part: optimizer" in error and "remedy: more GPUs" in error
    assert main(["plan", "Qwen3-4B", "--kv-slots", "40000000"]) == 2
    error = capsys.readouterr().err
    assert "largest part: kv" in error and "remedy: smaller rollout.kv_slots" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a model"),
        (["Qwen3-4B", "--gpu", "H10"], "unknown GPU; did you mean H100?"),
        (["Qwen3-4B", "--nodes", "0"], "--nodes 0: give a positive number"),
        (["Qwen9"], "neither a config.json nor a known model"),
        (["--config", str(CONFIGS / "eval.toml")], "cannot tell the stage"),
        (
            ["--config", str(CONFIGS / "stage3.toml"), "--gpus-per-node", "3"],
            "does not divide a world of 3 GPUs",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


def test_planning_needs_no_torch() -> None:
    code = "import sys, megatron_npr.cli as c; c.main(['plan', 'Qwen3-4B']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen3-8B", Layout(tp=4, pp=3, dp=1)),
        ("Qwen3-4B", Layout(tp=2, pp=4, vpp=3)),
        ("Qwen3-30B-A3B", Layout(tp=4, pp=2, ep=8, dp=4)),
        ("Qwen3-235B-A22B", Layout(tp=4, pp=8, first_layers=11, last_layers=11, ep=32, dp=8)),
    ],
)
def test_the_ranks_of_a_grid_hold_the_model_once(name: str, layout: Layout) -> None:
    """Sharded weights over all tensor, expert and pipeline ranks give the count of the model; what is replicated (norms,
    router, the tied copy on the last stage) is known in closed form."""
    model = KNOWN[name]
    held = [parameters_of(model, layout, stage) for stage in range(layout.pp)]
    dense, expert = (sum(column) for column in zip(*held, strict=True))
    experts = model.num_layers * model.num_experts * model.expert_parameters
    assert expert * layout.ep == experts
    norms = model.num_layers * (2 * model.hidden_size + 2 * model.head_dim) + model.hidden_size
    replicated = norms + model.num_layers * model.num_experts * model.hidden_size
    twice = model.embedding_parameters if model.tied_embeddings and layout.pp > 1 else 0
    assert (dense - replicated) * layout.tp + replicated == model.num_parameters - experts + twice


def test_memory_of_a_single_gpu_is_eighteen_bytes_a_parameter_and_the_cache() -> None:
    model = KNOWN["Qwen3-4B"]
    memory = memory_of(model, Layout(), Workload(kv_slots=1000))
    assert memory.weights + memory.gradients + memory.optimizer == 18 * model.num_parameters
    assert memory.kv == 1000 * 147_456  # 36 layers, keys and values of 8 heads of 128, bf16
    assert memory.engine_weights == 0
    assert kv_bytes_per_token(KNOWN["Qwen3-235B-A22B"], 8, 2) == 94 * 2 * 128 * 2  # 4 KV heads on 8 ranks


def test_fp8_keeps_two_more_bytes_a_projection_or_takes_the_place_of_theirs() -> None:
    model, work = KNOWN["Qwen3-4B"], Workload(kv_slots=1000)
    projections = model.num_parameters - model.embedding_parameters - model.hidden_size
    projections -= model.num_layers * (2 * model.hidden_size + 2 * model.head_dim)  # norms
    bf16, products, parameters = (
        memory_of(model, Layout(), replace(work, fp8=recipe, fp8_parameters=held))
        for recipe, held in ((None, False), ("tensorwise", False), ("tensorwise", True))
    )
    assert products.weights == bf16.weights + 2 * projections
    assert parameters.weights == bf16.weights
    assert products.activations == parameters.activations < bf16.activations
    # An engine of the same layout cannot read FP8 weights in place.
    assert bf16.engine_weights == products.engine_weights == 0
    assert parameters.engine_weights == 2 * model.num_parameters


@pytest.mark.slow
@pytest.mark.parametrize("case", memory_bench.CASES)
def test_planned_memory_is_within_a_tenth_of_what_training_adds_to_a_process(case: str) -> None:
    found = memory_bench.compare(case)
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)


def test_an_engine_with_weights_of_its_own_needs_them_twice_during_an_update() -> None:
    model, work = (
        KNOWN["Qwen3-30B-A3B"],
        Workload(kv_slots=1000, row_tokens=16, batch_tokens=16, max_running_requests=1),
    )
    layout = Layout(tp=4, ep=8, dp=8, sequence_parallel=True, engine_tp=4, engine_ep=16)
    memory = memory_of(model, layout, work)
    assert memory.engine_weights + memory.workspace + memory.activations == pytest.approx(
        2 * 2 * engine_parameters(model, layout) + 2e9
    )


@pytest.mark.parametrize(
    ("requests", "branches", "rows"), [(1024, 8, 8192), (4096, 1, 4096), (4096, 8, 16_384)]
)
def test_every_running_branch_has_a_row_of_logits_up_to_the_tokens_of_a_step(
    requests: int, branches: int, rows: int
) -> None:
    model, least = KNOWN["Qwen3-0.6B"], Workload(row_tokens=16, max_running_requests=1024, max_branches=1)
    work = replace(least, max_running_requests=requests, max_branches=branches)
    added = memory_of(model, Layout(), work).workspace - memory_of(model, Layout(), least).workspace
    assert work.max_running_branches == rows
    assert added == pytest.approx((rows - 1024) * model.vocab_size * 12)


def test_recompute_and_more_ranks_never_need_more_memory() -> None:
    model = KNOWN["Qwen3-14B"]
    by_recompute = [
        memory_of(model, Layout(tp=4, sequence_parallel=True), Workload(recompute=option)).activations
        for option in ("none", "selective", "full")
    ]
    assert by_recompute == sorted(by_recompute, reverse=True) and len(set(by_recompute)) == 3
    by_tp = [memory_of(model, Layout(tp=tp, engine_tp=tp), Workload()).total for tp in (1, 2, 4, 8)]
    by_dp = [memory_of(model, Layout(dp=dp), Workload()).total for dp in (1, 2, 4, 8)]
    assert by_tp == sorted(by_tp, reverse=True) and by_dp == sorted(by_dp, reverse=True)


def test_the_flops_of_a_step_are_six_a_parameter_and_token_and_the_visible_pairs() -> None:
    model = KNOWN["Qwen3-4B"]
    work = Workload(responses=1, response_tokens=1)
    pairs = 12 * 36 * 32 * 128 * 0.3
    assert train_flops(model, work) == pytest.approx(6 * model.num_parameters + pairs)


@pytest.mark.parametrize(("name", "nodes"), [("Qwen3-4B", 1), ("Qwen3-14B", 4), ("Qwen3-30B-A3B", 2)])
def test_the_search_takes_a_valid_layout_that_nothing_beats_by_far(name: str, nodes: int) -> None:
    model, cluster = KNOWN[name], Cluster(CLUSTER_GPUS["H100"], nodes, 8)
    work = Workload(kv_slots=65_536)
    found = best(model, cluster, work, "full")
    assert found.fits and found.layout.world_size == 8 * nodes
    others = random.Random(0).sample(list(candidates(model, cluster)), 20)
    for layout in others:
        other = evaluate(model, layout, cluster, found.work)
        if other.fits:
            assert found.times.rollout + found.times.train <= 1.06 * (other.times.rollout + other.times.train)


@pytest.mark.parametrize(
    ("name", "model", "nodes", "expected", "in_place"),
    [
        ("30b-a3b-4node", "Qwen3-30B-A3B", 4, EngineLayout(4, 8, 1), True),
        ("235b-a22b-32node", "Qwen3-235B-A22B", 32, EngineLayout(4, 32, 1), False),
    ],
)
def test_a_ready_configuration_of_experts_is_taken_at_run_time(
    name: str, model: str, nodes: int, expected: EngineLayout, in_place: bool
) -> None:
    """All that a run decides about its layout before it makes groups and tensors, at the world size of the configuration."""
    config = load_config(Stage3Config, CONFIGS / name / "stage3.toml")
    world_size, parallel, moe = 8 * nodes, config.parallel, ModelConfig(**vars(KNOWN[model]))
    check_sizes(world_size, tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, ep=parallel.ep)
    engine = engine_layout(config.rollout, parallel, moe, world_size)
    assert engine == expected
    layers = split_layers(
        moe.num_layers, pp=parallel.pp, first=parallel.first_layers, last=parallel.last_layers
    )
    places = world_size // parallel.pp
    trainer = TrainerLayout(
        layers, tp=parallel.tp, pp=parallel.pp, dp_cp=places // parallel.tp, ep=parallel.ep
    )
    planned = plan(moe, trainer, engine)
    assert planned.num_replicas == world_size // engine.size
    for replica in range(planned.num_replicas):
        moved = for_replica(planned, replica)
        assert (len(moved.transfers) == 0) == in_place
    for rank in {0, 1, engine.tp, engine.size - 1}:
        own = planned.routes[planned.routes["destination"] == rank]
        held = int((own["rows"] * own["row_length"]).sum())
        sizes = Layout(engine_tp=engine.tp, engine_ep=engine.ep)
        assert held == engine_parameters(moe, sizes)


@pytest.mark.parametrize(
    ("rollout", "world_size", "message"),
    [
        ({"tp": 4, "ep": 6}, 24, r"rollout\.ep = 6 and rollout\.tp = 4: make one a multiple of the other"),
        ({"tp": 1, "ep": 3}, 24, r"rollout\.ep = 3 does not divide the model's 128 experts"),
        ({"tp": 2, "ep": 8}, 12, r"rollout\.ep = 8 does not divide the world of 12 processes"),
        ({"tp": 8, "ep": 1}, 12, r"rollout\.tp = 8 does not divide the world of 12 processes"),
    ],
)
def test_an_engine_layout_that_cannot_decode_is_refused_in_one_line(
    rollout: dict[str, int], world_size: int, message: str
) -> None:
    moe = ModelConfig(**vars(KNOWN["Qwen3-30B-A3B"]))
    with pytest.raises(UserError, match=message):
        engine_layout(RolloutSettings(**rollout), ParallelSettings(), moe, world_size)


def test_experts_of_a_dense_model_are_refused() -> None:
    dense = ModelConfig(**vars(KNOWN["Qwen3-4B"]))
    assert engine_layout(RolloutSettings(tp=4), ParallelSettings(), dense, 8) == EngineLayout(4)
    with pytest.raises(UserError, match=r"rollout\.ep = 2: the model has no experts"):
        engine_layout(RolloutSettings(ep=2), ParallelSettings(), dense, 8)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("ep", [1, 2, 4, 8, 16])
def test_the_plan_counts_the_weights_that_an_engine_rank_holds(tp: int, ep: int) -> None:
    """Among them engines in which fewer ranks than share the attention hold experts, and cut them."""
    model = KNOWN["Qwen3-30B-A3B"]
    engine = Layout(engine_tp=tp, engine_ep=ep).engine(model)
    held = 0
    for weight in catalog(model).values():
        if weight.engine_holds(model.num_experts, engine, rank=0):
            cut, _, size = weight.engine_cut(engine, 0)
            held += local_size(weight.kind.matrix, cut, size)
    assert engine_parameters(model, Layout(engine_tp=tp, engine_ep=ep)) == held
