"""A step's loss is one mean over the trained tokens of its batch: a long response weighs as much as its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_npr.data.packing import PackedRow, TrainSample
from megatron_npr.rl.losses import LossSum, papo_loss
from megatron_npr.runtime.process_world import World
from megatron_npr.training.trainer import Trainer
from tests.support.families import save_family
from tests.support.training import new_trainer


@pytest.fixture(scope="module")
def trainer(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return new_trainer(world, save_family("qwen3 tied", tmp_path_factory.mktemp("model")))


def sample(length: int, advantage: float) -> TrainSample:
    """A response of random tokens, every third without loss, behind a prompt of its own."""
    rng = np.random.default_rng(length)
    prompt, response = rng.integers(12, 96, 4, np.int32), rng.integers(12, 96, length, np.int32)
    return TrainSample(prompt, response, np.arange(length) % 3 > 0, np.zeros(length, np.float32), advantage)


def objective(log_probs: Tensor, row: PackedRow) -> LossSum:
    return papo_loss(log_probs, row.advantages)


def gradient(trainer: Trainer, samples: list[TrainSample], rows: int) -> Tensor:
    """The gradient of a step on these samples, all weights in a row, float64; asserts in how many rows they lie."""
    packed = trainer.pack(samples, branching=False).rows
    assert len(packed) == rows
    trainer.accumulate(packed, objective)
    (chunk,) = trainer.chunks
    return torch.cat([weight.main_grad.flatten() for weight in chunk.parameters()]).double()


@pytest.mark.parametrize("lengths, rows", [((9, 60), 1), ((12, 110), 2)], ids=["in one row", "in two rows"])
def test_the_gradient_is_that_of_the_token_mean(
    lengths: tuple[int, int], rows: int, trainer: Trainer
) -> None:
    short, long = sample(lengths[0], 1.0), sample(lengths[1], -0.5)
    count_short, count_long = int(short.loss_mask.sum()), int(long.loss_mask.sum())
    alone_short, alone_long = gradient(trainer, [short], 1), gradient(trainer, [long], 1)
    token_mean = (count_short * alone_short + count_long * alone_long) / (count_short + count_long)
    sequence_means = (alone_short + alone_long) / 2
    found = gradient(trainer, [short, long], rows)
    assert float((found - token_mean).norm()) <= 1e-5 * float(token_mean.norm())
    assert float((found - sequence_means).norm()) >= 0.1 * float(sequence_means.norm())


def test_the_reported_loss_is_the_token_mean(trainer: Trainer) -> None:
    """At ratio 1 a token's loss is minus its advantage, so the mean can be counted by hand."""
    report = trainer.step([sample(12, 1.0), sample(110, -0.5)], objective, branching=False)
    assert report.num_targets == 8 + 73
    assert report.loss == pytest.approx(-(8 * 1.0 - 73 * 0.5) / 81, rel=1e-6)
