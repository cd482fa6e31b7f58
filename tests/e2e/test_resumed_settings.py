"""A run that continues with other settings of its optimizer trains by them, from the moments and the step it had."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_npr.cli import main
from megatron_npr.config import OptimizerSettings
from megatron_npr.data.samples import SftSample, write_samples
from megatron_npr.demo.base import FOLDER
from megatron_npr.runtime.process_world import World, close_world
from megatron_npr.training.checkpoint import Checkpoints
from megatron_npr.training.trainer import Trainer
from tests.support.families import save_family
from tests.support.training import new_trainer, step

FIRST = OptimizerSettings(lr=1e-2, warmup_steps=0, weight_decay=0.1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3 tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def written(world: World, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A checkpoint after three updates of ten with the settings FIRST."""
    checkpoints = Checkpoints(
        tmp_path_factory.mktemp("run"), world, keep=1, model_folder=model_folder, config={}
    )
    trainer = new_trainer(world, model_folder, optimizer=FIRST)
    for _ in range(3):
        step(trainer)
    checkpoints.save(3, trainer, {})
    return checkpoints


@pytest.fixture(scope="module")
def unchanged(world: World, model_folder: Path, written: Checkpoints) -> list[Tensor]:
    """The weights of the run that goes on as it was."""
    return weights_after_two_updates(resumed(world, model_folder, written, FIRST))


def resumed(world: World, folder: Path, checkpoints: Checkpoints, settings: OptimizerSettings) -> Trainer:
    trainer = new_trainer(world, folder, optimizer=settings)
    assert checkpoints.resume(trainer) == (3, {})
    return trainer


def weights_after_two_updates(trainer: Trainer) -> list[Tensor]:
    step(trainer)
    step(trainer)
    return [parameter.detach().clone() for parameter in trainer.policy.chunks[0].parameters()]


def group_value(name: str, value: Any) -> Callable[[Trainer], None]:
    """The setting put into torch's own optimizer by hand."""

    def change(trainer: Trainer) -> None:
        for group in trainer.optimizer.param_groups:
            group[name] = value

    return change


def clip(trainer: Trainer) -> None:
    trainer.optimizer.config.clip_grad = 1e-3
    for part in trainer.optimizer.chained_optimizers:
        part.config.clip_grad = 1e-3


def decay(trainer: Trainer) -> None:
    trainer.schedule.start_wd = trainer.schedule.end_wd = 0.9


@pytest.mark.parametrize(
    ("changed", "by_hand"),
    [
        ({"beta1": 0.5, "beta2": 0.9}, group_value("betas", (0.5, 0.9))),
        ({"eps": 1e-2}, group_value("eps", 1e-2)),
        ({"weight_decay": 0.9}, decay),
        ({"grad_clip": 1e-3}, clip),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_a_changed_setting_of_adam_acts_as_if_it_were_changed_in_the_running_optimizer(
    changed: dict[str, float],
    by_hand: Callable[[Trainer], None],
    world: World,
    model_folder: Path,
    written: Checkpoints,
    unchanged: list[Tensor],
) -> None:
    told = resumed(world, model_folder, written, FIRST)
    by_hand(told)
    expected = weights_after_two_updates(told)
    settings = FIRST.model_copy(update=changed)
    ours = weights_after_two_updates(resumed(world, model_folder, written, settings))
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(ours, unchanged, strict=True))


def rate(settings: OptimizerSettings, update: int, total: int) -> float:
    """The learning rate of update number `update` (1, 2, ...) of `total`, from the definition of each schedule."""
    warmup = settings.warmup(total)
    if update <= warmup:
        return settings.lr * update / warmup
    if settings.schedule == "constant":
        return settings.lr
    share = (update - warmup) / (total - warmup)
    part = 0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1 - share
    return settings.min_lr + part * (settings.lr - settings.min_lr)


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 5e-3},
        {"schedule": "linear", "min_lr": 1e-3},
        {"schedule": "cosine", "min_lr": 4e-3},
        {"warmup_steps": 6},
        {"schedule": "cosine", "warmup_fraction": 0.5},
    ],
    ids=str,
)
def test_the_rate_follows_the_new_schedule_from_the_step_reached(
    changed: dict[str, Any], world: World, model_folder: Path, written: Checkpoints
) -> None:
    settings = FIRST.model_copy(update=changed)
    trainer = resumed(world, model_folder, written, settings)
    rates = [step(trainer)[2] for _ in range(2)]
    assert rates == pytest.approx([rate(settings, update, 10) for update in (4, 5)], rel=1e-12)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    rows = [[3 + index, 40, 41, 42 + index] for index in range(8)]
    write_samples(path, [SftSample(str(row[0]), row, [50, 51, row[0], 1], "text") for row in rows])
    return path


def fine_tune(run: Path, samples: Path, *words: str) -> int:
    """`npr stage2` on the demo's base model."""
    given = {"run.dir": run, "model.path": FOLDER, "model.dtype": "fp32", "sft.data": samples}
    usual = {"log.backend": "none", "log.progress": "false", "optimizer.warmup_fraction": 0, "run.threads": 1}
    close_world()
    return main(["stage2", *(f"--{name}={value}" for name, value in (given | usual).items()), *words])


def rates(run: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_extended_cosine_run_does_not_spend_the_rest_at_rate_zero_and_what_is_kept_is_refused(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cosine = tmp_path / "run", ("--optimizer.min_lr=0", "--optimizer.lr=1e-4")
    assert fine_tune(run, samples, "--train.steps=2", *cosine) == 0
    assert rates(run)[-1] == 0
    assert fine_tune(run, samples, "--train.steps=4", *cosine, "--run.resume") == 0
    settings = OptimizerSettings(lr=1e-4, schedule="cosine")
    assert rates(run)[2:] == pytest.approx(
        [rate(settings, update, 4) for update in (3, 4)], rel=1e-12, abs=1e-20
    )
    before = (run / "config.toml").read_text(), (run / "metrics.jsonl").read_text()
    capsys.readouterr()
    for refused, named in (
        ("--run.seed=3", "run.seed = 3: "),
        ("--train.global_batch=2", "train.global_batch = 2: "),
        (f"--sft.data={changed_samples(samples, tmp_path)}", "sft.data = "),
    ):
        assert fine_tune(run, samples, "--train.steps=6", *cosine, "--run.resume", refused) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"npr: error: {named}") and said.count("\n") == 1
    assert ((run / "config.toml").read_text(), (run / "metrics.jsonl").read_text()) == before
    assert fine_tune(run, samples, "--train.epochs=1", *cosine, "--run.resume") == 2
    assert "these settings ask for 1 steps, the checkpoint in " in capsys.readouterr().err


def changed_samples(samples: Path, folder: Path) -> Path:
    path = folder / "changed.jsonl"
    path.write_text("\n".join(samples.read_text().splitlines()[1:]) + "\n")
    return path
