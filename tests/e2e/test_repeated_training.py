"""One seed, layout and number of threads give the same bits, however busy the machine is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_npr.config import BatchSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.rl.losses import papo_loss, sft_loss
from megatron_npr.runtime.process_world import World
from tests.support.families import save_family
from tests.support.training import TAGS, new_trainer

REPEATS = 5
FAMILIES = ("qwen3 tied", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def two_threads_beside_busy_processes() -> Iterator[None]:
    """A thread then comes late to its share of the work, now this one, now that one."""
    threads = torch.get_num_threads()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    for process in busy:
        process.kill()
        process.wait()


def wide_samples() -> list[TrainSample]:
    """Two responses of eight branches of 80 tokens: PyTorch shares element-wise work on [tokens, hidden] among threads from
    32,768 numbers on, and a branch's first token is predicted at a place that it shares with its siblings'."""
    rng = np.random.default_rng(5)
    samples = []
    for sign in (1.0, -1.0):
        branches = [
            [TAGS.step, *(int(token) for token in rng.integers(12, 96, 80)), TAGS.step_end] for _ in range(8)
        ]
        plans = [TAGS.guideline, *[TAGS.plan, 20, TAGS.plan_end] * 8, TAGS.guideline_end]
        response = [*plans, *chain.from_iterable(branches), TAGS.takeaway, 30, TAGS.takeaway_end, 1]
        ids = np.array(response, np.int32)
        everything = np.ones(len(ids), np.bool_)
        samples.append(
            TrainSample(np.array([11, 20], np.int32), ids, everything, np.zeros(len(ids), np.float32), sign)
        )
    return samples


def trained(world: World, folder: Path) -> list[Tensor]:
    """Weights after an update of SFT and one of PAPO."""
    trainer = new_trainer(world, folder)
    trainer.batch = BatchSettings(micro_batch_tokens=2048)
    trainer.step(wide_samples(), lambda lp, row: sft_loss(lp), branching=True)
    trainer.step(wide_samples(), lambda lp, row: papo_loss(lp, row.advantages), branching=True)
    return [weight.detach().clone() for weight in trainer.policy.parameters()]


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads_beside_busy_processes")
def test_training_again_beside_busy_processes_gives_the_same_bits(world: World, folder: Path) -> None:
    first = trained(world, folder)
    for _ in range(REPEATS):
        assert all(torch.equal(one, other) for one, other in zip(first, trained(world, folder), strict=True))


class AtomicSums(TorchDispatchMode):
    """Operators that were asked to add float32 by atomics: PyTorch's do so in the order in which threads arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            given = {**given, argument.name: value}
        if given.get("accumulate") and args[0].dtype == torch.float32:
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def test_no_operator_of_a_training_step_adds_in_the_order_of_its_threads(world: World, folder: Path) -> None:
    with AtomicSums() as seen:
        trained(world, folder)
    assert seen.found == set()
    with AtomicSums() as seen:  # what is looked for is there: a gather by index, differentiated
        torch.ones(3, requires_grad=True)[torch.tensor([1, 1])].sum().backward()
    assert seen.found != set()
