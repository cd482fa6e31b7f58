"""Linear layers with FP8 products inside Megatron: gradients, main_grad, whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_npr.bench.gpu import training as gpu_training
from megatron_npr.config import Fp8Settings
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model import linears
from megatron_npr.model.fp8_linears import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_npr.model.fp8_matmul import Fp8Format
from megatron_npr.model.policy import Policy
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.runtime.process_world import World, megatron_context
from tests.support.families import save_family
from tests.support.fp8 import layers as fp8_layers
from tests.support.fp8.layers import config_of, new_layer, numbers, rounded_terms
from tests.support.fp8.truth import E4M3, E5M2, Array
from tests.support.training import new_trainer, step

FORMATS: tuple[Fp8Format, ...] = ("hybrid", "e4m3")


@pytest.mark.parametrize("kind", fp8_layers.KINDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)])
def test_forward_and_both_gradients_are_products_of_rounded_numbers(
    kind: str, format: Fp8Format, dtype: torch.dtype, bound: float, world: World
) -> None:
    found = fp8_layers.errors(world, kind, format, dtype)
    assert max(found.values()) <= bound, found


@pytest.mark.parametrize("format", FORMATS)
def test_against_the_exact_product_the_error_is_that_of_rounding_its_factors(
    format: Fp8Format, world: World
) -> None:
    x, w, dy = numbers(3, 24, 40), numbers(4, 56, 40), numbers(5, 24, 56)
    layer = new_layer("column", config_of(world, format), w)
    own = x[:, None].clone().requires_grad_()
    with megatron_context():
        y, _ = layer(own)
        y.backward(dy[:, None])
    exact = [tensor.double().numpy() for tensor in (x, w, dy)]
    of_gradients = E5M2 if format == "hybrid" else E4M3
    forms = (E4M3, E4M3, of_gradients)
    (x, w, dy), (ex, ew, edy) = exact, [form.error(each) for form, each in zip(forms, exact, strict=True)]

    def bound(left: Array, left_error: Array, right: Array, right_error: Array) -> Array:
        return np.abs(left) @ right_error + left_error @ np.abs(right) + left_error @ right_error

    cases = {
        "y": ((y - layer.bias)[:, 0], x @ w.T, bound(x, ex, w.T, ew.T)),
        "dx": (own.grad[:, 0], dy @ w, bound(dy, edy, w, ew)),
        "dw": (layer.weight.grad, dy.T @ x, bound(dy.T, edy.T, x, ex)),
    }
    for name, (ours, truth, largest) in cases.items():
        error = np.abs(ours.detach().double().numpy() - truth)
        assert (error <= largest * (1 + 1e-4)).all(), name
        assert error.max() > 1e-4 * np.abs(truth).max(), f"{name} was not rounded"


def test_where_the_run_fuses_accumulation_gradients_are_summed_in_main_grad_in_float32(world: World) -> None:
    """Over two micro-batches of a bf16 layer; a weight without main_grad has an ordinary gradient."""
    w = numbers(1, 56, 40).bfloat16()
    layer = new_layer("row", config_of(world, "hybrid", torch.bfloat16), w)
    # Megatron refuses the setting where apex's GEMM is missing; ours needs none.
    layer.gradient_accumulation_fusion = True
    total = np.zeros((56, 40))
    layer.weight.main_grad = torch.zeros(56, 40)
    for seed in (10, 20):
        layer.weight.grad_added_to_main_grad = False
        x, dy = (numbers(seed + i, 24, count).bfloat16() for i, count in enumerate((40, 56)))
        with megatron_context():
            layer(x[:, None])[0].backward(dy[:, None])
        left, right = rounded_terms(*(each.double().numpy() for each in (x, w, dy)), "hybrid")["dw"]
        total += left @ right
        assert layer.weight.grad_added_to_main_grad is True and layer.weight.main_grad.dtype == torch.float32
        layer.weight.grad = None
    difference = np.abs(layer.weight.main_grad.double().numpy() - total).max()
    assert difference <= 1e-6 * np.abs(total).max()  # 2**-9 of it, had a micro-batch been rounded to bf16
    del layer.weight.main_grad
    with megatron_context():
        layer(x[:, None])[0].backward(dy[:, None])
    assert layer.weight.grad.dtype == torch.bfloat16 and bool(layer.weight.grad.abs().sum() > 0)


def test_frozen_weights_have_no_gradient_and_inputs_have_theirs(world: World) -> None:
    layer = new_layer("column", config_of(world, "hybrid"), numbers(1, 56, 40))
    layer.weight.requires_grad_(False)
    own = numbers(0, 24, 40)[:, None].requires_grad_()
    with megatron_context():
        layer(own)[0].sum().backward()
    assert layer.weight.grad is None and bool(own.grad.abs().sum() > 0)


def layer_types(policy: Policy) -> list[set[type]]:
    kinds = (
        Fp8ColumnParallelLinear,
        Fp8RowParallelLinear,
        linears.ColumnParallelLinear,
        linears.RowParallelLinear,
    )
    return [
        {type(module) for module in layer.modules() if isinstance(module, kinds)}
        for layer in policy.chunks[0].decoder.layers
    ]


FP8_TYPES = {linears.Fp8NormColumnParallelLinear, Fp8RowParallelLinear}
BF16_TYPES = {linears.NormColumnParallelLinear, linears.RowParallelLinear}


def test_only_the_projections_are_fp8_and_not_in_the_layers_that_stay_in_bf16(world: World) -> None:
    model = fp8_layers.MODEL
    policy = build_policy(model, world, fp8=Fp8Settings(first_layers_bf16=1, last_layers_bf16=2))
    assert layer_types(policy) == [BF16_TYPES, FP8_TYPES, BF16_TYPES, BF16_TYPES]
    assert layer_types(build_policy(model, world, fp8=Fp8Settings())) == [FP8_TYPES] * 4
    assert layer_types(build_policy(model, world)) == [BF16_TYPES] * 4
    outside = {
        type(module) for module in policy.modules() if isinstance(module, linears.ColumnParallelLinear)
    }
    assert outside - FP8_TYPES - BF16_TYPES == {linears.ColumnParallelLinear}  # the vocabulary


@pytest.mark.parametrize("family", ["qwen3 tied", "qwen2", "qwen3_moe"])
def test_checkpoints_do_not_know_of_fp8(family: str, world: World, tmp_path: Path) -> None:
    model = read_model_config(save_family(family, tmp_path))
    with megatron_context():
        ours, theirs = (
            (
                {name: each.key for name, each in policy.chunks[0].sharded_state_dict().items()},
                {name: weight.shape for name, weight in policy.named_parameters()},
            )
            for policy in (build_policy(model, world, fp8=fp8) for fp8 in (Fp8Settings(), None))
        )
    assert ours == theirs and len(ours[1]) > 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3 tied", tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("settings", [Fp8Settings(), Fp8Settings(format="e4m3", first_layers_bf16=1)])
def test_a_tiny_model_learns_its_samples_by_heart_in_fp8(
    settings: Fp8Settings, world: World, folder: Path
) -> None:
    trainer, exact = (new_trainer(world, folder, fp8=fp8) for fp8 in (settings, None))
    losses = [step(trainer)[0] for _ in range(20)]
    first = step(exact)[0]
    assert losses[0] == pytest.approx(first, rel=0.05) and losses[0] != first
    assert losses[-1] < 0.03 * losses[0]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_what_backward_computes_again_is_the_same_in_fp8(recompute: str, world: World, folder: Path) -> None:
    kept, again = (
        new_trainer(world, folder, fp8=Fp8Settings(), recompute=each) for each in ("none", recompute)
    )
    assert [step(kept) for _ in range(3)] == [step(again) for _ in range(3)]


def test_experts_train_in_fp8_with_as_many_tokens_as_come(world: World, tmp_path: Path) -> None:
    experts = save_family("qwen3_moe", tmp_path)
    trainer, exact = (new_trainer(world, experts, fp8=fp8) for fp8 in (Fp8Settings(), None))
    losses, first = [step(trainer)[0] for _ in range(5)], step(exact)[0]
    assert losses[0] == pytest.approx(first, rel=0.05) and losses[0] != first
    assert losses[-1] < 0.7 * losses[0]


def test_the_gpu_bench_says_whose_fp8_it_timed(world: World) -> None:
    sizes = gpu_training.TINY
    figures = gpu_training.train(world, sizes, 1024, 1, rate=1e9, fp8=Fp8Settings())
    assert (figures.precision, figures.library) == ("fp8", "Megatron-Core, FP8 by torch._scaled_mm")
    assert figures.seconds > 0
