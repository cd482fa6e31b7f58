"""The loss that balances experts, and its gradient, against float64: over the tokens of responses and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_npr.config import BatchSettings, OptimizerSettings, Recompute
from megatron_npr.data.packing import TrainSample, pack_row, plan_rows
from megatron_npr.hf.huggingface import export_tensors, read_model_config
from megatron_npr.model.load_balance import ExpertLoad
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.rl.losses import sft_loss
from megatron_npr.runtime.process_world import World, init_world
from megatron_npr.sharding.weights import global_name
from megatron_npr.training.trainer import Trainer
from tests.support.families import save_family
from tests.support.training import TAGS

COEFFICIENT = 0.01


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Left open: Megatron's groups are made once a process."""
    return init_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3_moe", tmp_path_factory.mktemp("model"))


def plain_samples(count: int = 6, length: int = 30) -> list[TrainSample]:
    """Responses without branches, two to a prompt."""
    rng = np.random.default_rng(3)
    return [
        TrainSample(
            prompt_ids=np.array([11, 20 + index // 2, 30, 10], np.int32),
            response_ids=rng.integers(12, 96, length - 4 + index).astype(np.int32),
            loss_mask=np.ones(length - 4 + index, np.bool_),
            old_log_probs=np.zeros(length - 4 + index, np.float32),
        )
        for index in range(count)
    ]


class Gradient:
    """The gradient of one global batch by the model's own names, float64; the loss that balances, and the whole norm."""

    def __init__(self, tensors: dict[str, Tensor], load_balance: float) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.load_balance = load_balance
        self.norm = float(sum(tensor.square().sum() for tensor in self.tensors.values()) ** 0.5)


def ours(
    world: World,
    folder: Path,
    samples: list[TrainSample],
    *,
    length: int = 512,
    budget: int | None = None,
    coefficient: float = COEFFICIENT,
    share_prompts: bool = False,
    recompute: Recompute = "none",
) -> Gradient:
    """Fine-tuning on rows of at most `budget` tokens (a row's by default), padded to `length`."""
    policy = build_policy(read_model_config(folder), world, router_aux_loss=coefficient, recompute=recompute)
    load_policy_weights(policy, folder)
    trainer = Trainer(
        policy,
        world,
        optimizer=OptimizerSettings(),
        batch=BatchSettings(micro_batch_tokens=length),
        tags=TAGS,
        pad_id=0,
        num_updates=1,
    )
    rows = [
        pack_row(samples, plan, length=length, tags=TAGS, branching=False, pad_id=0)
        for plan in plan_rows(samples, row_tokens=budget or length, share_prompts=share_prompts)
    ]
    totals = trainer.accumulate(rows, lambda log_probs, row: sft_loss(log_probs))
    gradients = {
        global_name(name, first_layer=0, first_expert=0): weight.main_grad
        for name, weight in policy.chunks[0].named_parameters()
    }
    return Gradient(export_tensors(gradients, policy.model_config), totals["load_balance"])


def truth(folder: Path, samples: list[TrainSample], coefficient: float = COEFFICIENT) -> Gradient:
    """The gradient by transformers' model in float64, one sequence after the other, with the loss by its definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    loss, scores = torch.zeros((), dtype=torch.float64), []
    for sample in samples:
        ids = torch.from_numpy(np.concatenate((sample.prompt_ids, sample.response_ids))).long()
        start = len(sample.prompt_ids)
        output = model(ids[None], output_router_logits=True)
        log_probs = output.logits[0].log_softmax(-1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]
        loss = loss - log_probs.sum() / sum(len(other.response_ids) for other in samples)
        scores.append(torch.stack([layer[start:].softmax(-1) for layer in output.router_logits]))
    scores_LTE = torch.cat(scores, 1)
    layers, tokens, experts = scores_LTE.shape
    per_token = model.config.num_experts_per_tok
    balance = torch.zeros((), dtype=torch.float64)
    for layer in range(layers):
        chosen = scores_LTE[layer].topk(per_token, dim=-1).indices
        for expert in range(experts):
            share = (chosen == expert).sum() / (tokens * per_token)
            balance = balance + experts * share * scores_LTE[layer, :, expert].mean()
    (loss + coefficient * balance).backward()
    gradients = {
        name: part for name, weight in model.named_parameters() for name, part in apart(name, weight)
    }
    return Gradient(gradients, float(balance.detach()) / layers)


def apart(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Gradients by the names of a folder, where every expert has its own."""
    assert weight.grad is not None
    layer, is_expert, kind = name.partition(".experts.")
    parts = kind.removesuffix("_proj").split("_")  # gate_up or down
    if not is_expert:
        yield name, weight.grad
        return
    for expert, gradient in enumerate(weight.grad):
        for part, rows in zip(parts, gradient.chunk(len(parts)), strict=True):
            yield f"{layer}.experts.{expert}.{part}_proj.weight", rows


def assert_equal_gradients(found: Gradient, expected: Gradient, tolerance: float = 1e-5) -> None:
    assert found.load_balance == pytest.approx(expected.load_balance, rel=tolerance)
    assert found.norm == pytest.approx(expected.norm, rel=tolerance)
    for name, gradient in expected.tensors.items():
        error = float((found.tensors[name].reshape(gradient.shape) - gradient).norm())
        assert error <= tolerance * expected.norm, f"{name}: {error:.3g} of {expected.norm:.3g}"


def test_the_gradient_is_that_of_the_definition_in_float64(world: World, folder: Path) -> None:
    samples = plain_samples()
    found, expected = ours(world, folder, samples, coefficient=1.0), truth(folder, samples, 1.0)
    assert_equal_gradients(found, expected)
    routers = [name for name in expected.tensors if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    without = truth(folder, samples, 0.0)
    for name in routers:  # and the loss is what moves the routers: a check that could not fail otherwise
        moved = expected.tensors[name] - without.tensors[name]
        error = float((found.tensors[name] - expected.tensors[name]).norm())
        assert error <= 1e-4 * float(moved.norm()), name


@pytest.mark.parametrize("length", [128, 512, 4096])
def test_a_sample_of_100_tokens_has_one_gradient_in_a_row_of(length: int, world: World, folder: Path) -> None:
    samples = plain_samples(1, 100)
    found, expected = ours(world, folder, samples, length=length), truth(folder, samples)
    assert_equal_gradients(found, expected)
    assert found.norm == pytest.approx(truth(folder, samples, 0.0).norm, rel=0.1), "the loss is a small part"


@pytest.mark.parametrize(
    ("budget", "share_prompts", "recompute"),
    [
        pytest.param(40, False, "none", id="one sample a micro-batch"),
        pytest.param(80, True, "none", id="prompts shared by two"),
        pytest.param(40, True, "none", id="prompts shared, groups split"),
        pytest.param(128, False, "selective", id="selective recompute"),
        pytest.param(128, False, "full", id="full recompute"),
    ],
)
def test_the_gradient_does_not_depend_on_micro_batches(
    budget: int, share_prompts: bool, recompute: Recompute, world: World, folder: Path
) -> None:
    samples = plain_samples()
    whole = ours(world, folder, samples, coefficient=1.0)
    found = ours(
        world,
        folder,
        samples,
        length=128,
        budget=budget,
        coefficient=1.0,
        share_prompts=share_prompts,
        recompute=recompute,
    )
    assert_equal_gradients(found, whole)


def test_without_the_loss_nothing_is_counted(world: World, folder: Path) -> None:
    samples = plain_samples(2)
    found, expected = ours(world, folder, samples, coefficient=0.0), truth(folder, samples, 0.0)
    assert np.isnan(found.load_balance)
    assert found.norm == pytest.approx(expected.norm, rel=1e-5)


def test_an_even_load_has_loss_one_and_no_tokens_have_none() -> None:
    load = ExpertLoad(4, 2, torch.device("cpu"))
    assert load.loss == 0.0
    load.add(
        torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 0), torch.full((4, 4), 0.25)
    )
    assert load.loss == pytest.approx(1.0)
    load.add(torch.zeros(9, 4, dtype=torch.bool), torch.zeros(9, 4))
    assert load.loss == pytest.approx(1.0)
