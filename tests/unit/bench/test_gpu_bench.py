"""`make gpu` at small sizes on a CPU: the same functions in the same processes; the figures mean nothing, the thresholds do."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npr.bench.gpu import engine as gpu_engine
from megatron_npr.bench.gpu import layout as gpu_layout
from megatron_npr.bench.gpu import model as gpu_model
from megatron_npr.bench.gpu import run as gpu
from megatron_npr.bench.gpu.model import ScriptedModel, bytes_read, random_weights
from megatron_npr.bench.gpu.part import PARTS, Part, plain
from megatron_npr.bench.gpu.result import read_result, result_file, table, thresholds, write_result
from megatron_npr.bench.gpu.timing import added_bytes, waits
from megatron_npr.bench.timing import in_own_process
from megatron_npr.planning.times import model_flops
from megatron_npr.sharding.architecture import KNOWN
from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel
from npr_engine.testing import GRAMMAR
from npr_engine.trace import examine
from npr_ext.testing import random_layout
from tests.support.places import ROOT

CPU = torch.device("cpu")


def test_figures_are_kept_where_the_pages_say() -> None:
    assert gpu.RESULTS == ROOT / "tests" / "bench" / "results"


def test_layout_and_attention_figures_are_those_of_the_standard_layout() -> None:
    layout = gpu_layout.measure_layout(CPU, tiny=True)
    assert layout.tokens == 2048 and layout.waits == [] and layout.layout_us > 0
    (attention,) = gpu_layout.measure_attention(CPU, tiny=True).values()
    assert attention.density == pytest.approx(random_layout(0, 1024).layout().density())
    ratio = attention.branching_tflops / attention.causal_tflops
    assert attention.branching_over_causal == pytest.approx(ratio)


def test_attention_takes_fourteen_operations_a_pair_head_and_dimension() -> None:
    assert gpu_layout.Shape(8, heads=3, head_dim=5).flops(7) == 14 * 7 * 3 * 5


def test_engine_figures_have_every_batch_and_both_precisions() -> None:
    figures = gpu_engine.measure(CPU, tiny=True)
    assert list(figures.decoding) == ["batch 1", "batch 4", "batch 1, FP8", "batch 4, FP8", "4 branches"]
    assert {name: each.rows for name, each in figures.decoding.items()}["4 branches"] == 4
    assert all(each.graph_share == each.waits_per_step == 0 for each in figures.decoding.values())
    assert figures.fork_join.branches == 2 and figures.versus_transformers > 0
    assert json.loads(json.dumps(plain(figures))) == plain(figures)


@pytest.mark.parametrize("parts", [["log_probs"], ["training"], ["papo"]])
def test_a_part_leaves_its_figures_in_the_file(
    parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--tiny", "--results", str(tmp_path), *parts]) == 0
    found = read_result(tmp_path / "tiny-cpu.json")
    assert list(found["parts"]) == parts and found["not_measured"] == {}
    printed = capsys.readouterr().out
    if parts == ["training"]:
        assert [figures["row_tokens"] for figures in found["parts"]["training"]] == [1024, 2048]
        assert all(0 < figures["density"] < 0.5 for figures in found["parts"]["training"])
    if parts == ["papo"]:
        papo = found["parts"]["papo"]
        assert list(papo["phases"]) == ["offload", "rollout", "onload", "update", "weight sync"]
        assert papo["zero_copy_bytes"] == 0 and papo["responses"] == 4 and papo["trained_tokens"] > 0
        assert "one PAPO step" in printed and "onload" in printed


def test_a_part_that_fails_is_named_and_the_others_keep_their_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_result(tmp_path / "tiny-cpu.json", {"parts": {"papo": PAPO}})
    monkeypatch.setitem(PARTS, "broken", Part("layout", "nothing", "no such part", {}))
    monkeypatch.setitem(
        PARTS, "elsewhere", Part("layout", "x", "needs more", {"no_such_module": "no-such-package"})
    )
    assert gpu.main(["--tiny", "--results", str(tmp_path), "broken", "elsewhere"]) == 1
    found = read_result(tmp_path / "tiny-cpu.json")
    assert found["parts"] == {"papo": PAPO}
    assert found["not_measured"] == {
        "broken": "failed with exit code 2",
        "elsewhere": "skipped: not installed: no-such-package",
    }
    assert "gpu bench: elsewhere skipped: not installed: no-such-package" in capsys.readouterr().err


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = result_file(tmp_path, "NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    write_result(path, {"parts": {"a": 1}})
    with pytest.raises(TypeError):
        write_result(path, {"parts": {"a": object()}})
    assert read_result(path)["parts"] == {"a": 1}


DECODING = {"roofline_share": 0.7, "graph_share": 1.0}
TRAINING = {
    "precision": "bf16",
    "row_tokens": 8192,
    "mfu": 0.5,
    "seconds": 3.0,
    "planned_over_measured": 1.05,
}
PAPO: dict[str, Any] = {
    "responses": 4,
    "response_tokens": 9,
    "phases": {"rollout": {"seconds": 1.0, "peak_gb": 2.0}},
    "zero_copy_ms": 7.0,
    "zero_copy_bytes": 0,
}
PARTS_OF_A_RUN: dict[str, Any] = {
    "layout": {"tokens": 5, "layout_us": 299.0, "waits": ["cudaStreamSynchronize"]},
    "attention": {"8192": {"branching_over_causal": 0.1}, "32768": {"branching_over_causal": 0.8}},
    "engine": {
        "decoding": {"batch 1": DECODING, "64 branches": DECODING},
        "fork_join": {"operations_us": 150.0},
        "transformers_batch": 32,
        "versus_transformers": None,
    },
    "log_probs": {"added_bytes": {"8192": 100, "65536": 103}},
    "training": [TRAINING, {**TRAINING, "precision": "fp8", "seconds": 2.5, "planned_over_measured": 0.5}],
    "papo": PAPO,
}


def test_every_threshold_of_the_issues_is_judged_and_the_missed_ones_are_named() -> None:
    found = list(thresholds(PARTS_OF_A_RUN))
    missed = [threshold.name for threshold in found if not threshold.held]
    assert missed == [
        "host waits while laying out",
        "decoding, batch 1: share of the roofline",
        "training in fp8 at 8192: times faster than bf16",
        "zero-copy update",
    ]
    assert {threshold.name: threshold.measured for threshold in found}[
        "training in fp8 at 8192: times faster than bf16"
    ] == pytest.approx(1.2)
    lines = table(PARTS_OF_A_RUN).splitlines()
    assert sum("MISSED" in line for line in lines) == len(missed)
    assert sum(line.endswith("held") for line in lines) == len(found) - len(missed)
    assert "attention at 32768" in "".join(lines) and "attention at 8192" not in "".join(lines)
    assert table({}) == ""


def test_a_decode_step_reads_every_weight_once() -> None:
    config = gpu_model.TINY
    weights = random_weights(config, CPU, torch.bfloat16)
    assert bytes_read(config, torch.bfloat16, fp8=False) == sum(each.nbytes for each in weights.values())
    model = InferenceModel(config, weights, fp8=True)
    saved = sum(weight.nbytes - copy.values_DC.nbytes for copy, weight in model._quantized)
    assert saved > 0
    plain_bytes = sum(each.nbytes for each in weights.values())
    assert bytes_read(config, torch.bfloat16, fp8=True) == plain_bytes - saved
    assert bytes_read(gpu_model.FULL, torch.bfloat16, fp8=False) == 2 * KNOWN["Qwen3-4B"].num_parameters


def test_a_scripted_model_says_its_script_and_takes_another_one() -> None:
    sizes = gpu_engine.TINY
    model = ScriptedModel(sizes.model, random_weights(sizes.model, CPU, torch.float32), 512)
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=512))
    for branch_tokens in (4, 9):
        script = gpu_engine.response_script(GRAMMAR.vocabulary, 6, branches=3, branch_tokens=branch_tokens)
        model.follow(script.next_token)
        (rollout,) = engine.generate([[12, 13, 14, 15, 16, 17]], script.params)
        execution = examine(rollout)
        assert rollout.finish_reason == "eos" and execution.parallel_blocks == 1
        assert execution.sampled == script.sampled_tokens


def test_flops_count_the_output_matrix_for_trained_tokens_only() -> None:
    model = KNOWN["Qwen3-4B"]
    everything = model_flops(model, tokens=10, targets=10, pairs=0)
    assert everything == 60 * model.num_parameters
    less = everything - model_flops(model, tokens=10, targets=4, pairs=0)
    assert less == 36 * model.embedding_parameters
    assert model_flops(model, tokens=0, targets=0, pairs=3) == 36 * 36 * 32 * 128


def test_a_cpu_waits_for_nobody() -> None:
    assert waits(lambda: None, CPU) == []


def ones_add(megabytes: int) -> int:
    return added_bytes(functools.partial(torch.ones, megabytes << 18), CPU)


def test_a_cpu_knows_what_work_adds() -> None:
    """In a process of its own: here, garbage of other tests may be collected meanwhile."""
    assert in_own_process(functools.partial(ones_add, 64)) == pytest.approx(64 << 20, rel=0.1)


def test_the_bench_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
