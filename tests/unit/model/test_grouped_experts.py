"""Experts as grouped GEMMs: chosen where the library has them, the same names, logits and updates as one MLP after the other.

Transformer Engine's GEMM cannot be had here: `GroupedLinear` has its parameters and its signature, in plain PyTorch. Megatron's
own TEGroupedMLP runs over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.hf.huggingface import export_tensors, read_model_config
from megatron_npr.hf.tensor_names import huggingface_names
from megatron_npr.model import linears
from megatron_npr.model.experts import experts_spec
from megatron_npr.model.linears import LinearModules
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights, local_weights
from megatron_npr.rl.losses import papo_loss
from megatron_npr.runtime.process_world import World, init_world, megatron_context
from megatron_npr.sharding.weights import global_name
from megatron_npr.training.engine_weights import full_weights
from megatron_npr.training.trainer import Trainer
from npr_ext import branch_layout
from tests.distributed.workers.parity import TAGS, branching_samples
from tests.support.errors import assert_as_exact_as
from tests.support.families import save_family
from tests.support.logits.transformers import exact_logits, transformers_logits


class GroupedLinear(torch.nn.Module):
    """x [T, C], split among the experts by `m_splits`, times each one's weight; [T, D] and no bias."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__()
        for number in range(num_gemms):
            self.register_parameter(
                f"weight{number}", torch.nn.Parameter(torch.zeros(output_size, input_size))
            )

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        parts = zip(x.split(m_splits), self.parameters(), strict=True)
        return torch.cat([functional.linear(part, weight) for part, weight in parts]), None


GROUPED = replace(linears.OWN, grouped=(GroupedLinear, GroupedLinear))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Left open: Megatron's groups are made once a process."""
    return init_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3_moe", tmp_path_factory.mktemp("model"))


def test_the_library_decides_how_experts_are_computed() -> None:
    own = experts_spec(linears.OWN).submodules.experts
    assert own.module is SequentialMLP
    assert own.submodules.linear_fc1 is linears.OWN.column and own.submodules.linear_fc2 is linears.OWN.row
    column, row = type("Column", (GroupedLinear,), {}), type("Row", (GroupedLinear,), {})
    grouped = experts_spec(replace(linears.TRANSFORMER_ENGINE, grouped=(column, row))).submodules.experts
    assert grouped.module is TEGroupedMLP
    assert grouped.submodules.linear_fc1 is column and grouped.submodules.linear_fc2 is row
    has_them = transformer_engine.TEColumnParallelGroupedLinear is not None
    assert (linears.TRANSFORMER_ENGINE.grouped is not None) == has_them


@pytest.mark.parametrize("projection", ["linear_fc1", "linear_fc2"])
def test_both_forms_have_one_name_with_the_models_own_numbers(projection: str) -> None:
    layer = "decoder.layers.2.mlp.experts."
    sequential = global_name(f"{layer}local_experts.3.{projection}.weight", first_layer=10, first_expert=16)
    grouped = global_name(f"{layer}{projection}.weight3", first_layer=10, first_expert=16)
    assert sequential == grouped == f"decoder.layers.12.mlp.experts.local_experts.19.{projection}.weight"
    expected = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}[projection]
    assert huggingface_names(grouped) == tuple(
        f"model.layers.12.mlp.experts.19.{part}.weight" for part in expected
    )


def test_a_policy_of_grouped_experts_has_the_names_the_logits_and_the_bits_of_the_folder(
    folder: Path, world: World
) -> None:
    config = read_model_config(folder)
    policy = build_policy(config, world, linears=GROUPED).eval()
    assert policy.config.moe_grouped_gemm
    own = {name for name, _ in policy.chunks[0].named_parameters() if ".experts." in name}
    assert "decoder.layers.3.mlp.experts.linear_fc2.weight7" in own
    sequential = local_weights(build_policy(config, world))
    assert {name: each.shape for name, each in local_weights(policy).items()} == {
        name: each.shape for name, each in sequential.items()
    }
    load_policy_weights(policy, folder)
    token_ids = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))
    layout = branch_layout(token_ids, tags=TAGS, prompt_lengths=4, branching=False).as_tensor()
    with torch.no_grad(), megatron_context():
        logits = policy.logits(token_ids[None], layout)[0]
    assert_as_exact_as(logits, transformers_logits(folder, token_ids), exact_logits(folder, token_ids))
    ours, theirs = export_tensors(full_weights(policy), config), load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def updated(folder: Path, world: World, modules: LinearModules) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradient norms of two updates, and the weights after them."""
    policy = build_policy(read_model_config(folder), world, linears=modules)
    load_policy_weights(policy, folder)
    trainer = Trainer(
        policy,
        world,
        # With its usual eps Adam's first updates are the signs of gradients, also where these are all rounding.
        optimizer=OptimizerSettings(lr=1e-1, eps=1.0),
        batch=BatchSettings(micro_batch_tokens=128),
        tags=TAGS,
        pad_id=0,
        num_updates=2,
    )
    figures = []
    for _ in range(2):
        report = trainer.step(
            branching_samples(), lambda lp, row: papo_loss(lp, row.advantages), branching=True
        )
        figures += [report.loss, report.grad_norm]
    return figures, full_weights(policy)


def test_grouped_experts_are_trained_as_single_ones(folder: Path, world: World) -> None:
    (mine, weights), (theirs, others) = (updated(folder, world, each) for each in (GROUPED, linears.OWN))
    assert mine == pytest.approx(theirs, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-6, atol=1e-6)
