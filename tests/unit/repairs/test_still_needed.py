"""The installed libraries still need our repairs. A test that fails is good news: delete the repair, its row and the test."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import megatron.core
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu
from megatron.core.transformer.moe.router import TopKRouter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megatron_npr.repairs.megatron_on_cpu import CUDA_CALLS, cpu_runtime
from megatron_npr.repairs.table import REPAIRS

TRANSFORMER_ENGINE = Path(sys.prefix) / "transformer-engine" / "transformer_engine"


@functools.cache
def megatron_sources() -> str:
    """All of Megatron-Core's Python as one text."""
    (folder,) = megatron.core.__path__
    return "\n".join(path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.py"))


def state_of_adamw_is_not_loaded() -> bool:
    weight = torch.zeros(2)
    optimizer = SimpleNamespace(
        param_groups=[{"params": [weight]}],
        state={weight: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
    )
    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    part = SimpleNamespace(model_param_group_index_map={"w": (0, 0)}, config=config, optimizer=optimizer)
    method: Any = DistributedOptimizer._set_main_param_and_optimizer_states
    try:
        method(part, "w", {"param": torch.ones(2), "exp_avg": torch.ones(2)})
    except KeyError as error:
        return error.args == ("step",)
    return False


def gathered_state_has_no_padding() -> bool:
    buffer = SimpleNamespace(numel=256, numel_unpadded=200)
    part = SimpleNamespace(
        data_parallel_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
        gbuf_ranges=[{torch.float32: []}],
        buffers=[buffer],
    )
    method: Any = DistributedOptimizer.get_parameter_state_dp_zero
    with mock.patch.object(torch.distributed, "get_process_group_ranks", return_value=[0]):
        state = method(part, use_gloo_comm=False, empty_data=True)
    return len(state[0][torch.float32]["param"]) != buffer.numel


def gating_needs_transformer_engine() -> bool:
    router = SimpleNamespace(
        weight=torch.nn.Parameter(torch.ones(4, 8)),
        bias=None,
        config=SimpleNamespace(moe_router_dtype="fp32"),
    )
    method: Any = TopKRouter.gating
    try:
        with cpu_runtime():
            method(router, torch.ones(3, 1, 8))
    except NameError as error:
        return "te_general_gemm" in str(error)
    return False


def untied_head_is_the_embedding() -> bool:
    chunk = SimpleNamespace(
        pre_process=True,
        post_process=True,
        share_embeddings_and_output_weights=False,
        embedding=SimpleNamespace(word_embeddings=SimpleNamespace(weight="embedding")),
        output_layer=SimpleNamespace(weight="head"),
    )
    method: Any = GPTModel.shared_embedding_or_output_weight
    return bool(method(chunk) == "embedding")


def objects_are_unpickled_without_a_limit() -> bool:
    written = io.BytesIO()
    torch.save(SimpleNamespace(kind="no plain data"), written)
    written.seek(0)
    planner: Any = object.__new__(DefaultLoadPlanner)
    planner.flatten_state_dict, planner.state_dict = False, {}
    planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="it")), written)
    return "it" in planner.state_dict


def transformer_engine_pickles() -> bool:
    if not TRANSFORMER_ENGINE.is_dir():
        pytest.skip("Transformer Engine's Python is not here: make setup puts it there")
    text = (TRANSFORMER_ENGINE / "pytorch" / "module" / "base.py").read_text(encoding="utf-8")
    return "pickle.dumps(" in text and "pickle.loads(" in text


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_ENGINE = "transformer_engine.pytorch.module.base:TransformerEngineBaseModule"
CHECKS: dict[str, Callable[[], bool]] = {
    f"{_OPTIMIZER}._set_main_param_and_optimizer_states": state_of_adamw_is_not_loaded,
    f"{_OPTIMIZER}.get_parameter_state_dp_zero": gathered_state_has_no_padding,
    "megatron.core.transformer.moe.router:Router.gating": gating_needs_transformer_engine,
    "megatron.core.tensor_parallel.layers:ColumnParallelLinear.weight.allreduce": lambda: (
        "not (self.is_expert and self.expert_parallel)" in megatron_sources()
    ),
    "megatron.core.models.gpt:GPTModel.shared_embedding_or_output_weight": untied_head_is_the_embedding,
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": lambda: isinstance(
        maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True), torch.Tensor
    ),
    "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes": objects_are_unpickled_without_a_limit,
    f"{_ENGINE}.get_extra_state": transformer_engine_pickles,
    f"{_ENGINE}.set_extra_state": transformer_engine_pickles,
}


@pytest.mark.parametrize("symbol", CHECKS)
def test_the_library_fails_without_the_repair(symbol: str) -> None:
    (repair,) = [each for each in REPAIRS if each.symbol == symbol]
    assert CHECKS[symbol](), f"{symbol}: {repair.until}: delete {repair.where}"


@pytest.mark.parametrize("symbol", [each.symbol for each in CUDA_CALLS])
def test_megatron_still_calls_cuda_by_this_name(symbol: str) -> None:
    module, _, path = symbol.partition(":")
    name = {"torch.cuda": f"torch.cuda.{path}", "torch.nn": ".cuda("}.get(module, path)
    assert name in megatron_sources(), f"Megatron names {name} no longer: delete its row in CUDA_CALLS"
