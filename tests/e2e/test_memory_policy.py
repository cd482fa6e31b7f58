"""Trainer and engine take turns with the memory: nothing that they compute depends on it, and it is really given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_npr.config import MemorySettings, Stage3Config, load_config
from megatron_npr.demo.base import FOLDER
from megatron_npr.runtime.process_world import World
from megatron_npr.stages import stage3
from megatron_npr.training.offload import TrainerMemory, gradient_buffers, optimizer_tensors
from tests.support.families import save_family
from tests.support.places import CONFIGS
from tests.support.training import new_trainer, step

DEMO = CONFIGS / "demo" / "stage3.toml"
EVERYTHING = MemorySettings(offload_optimizer=True, offload_gradients=True, release_kv=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3 untied", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [MemorySettings(offload_optimizer=True), MemorySettings(offload_gradients=True), EVERYTHING]
)
def test_training_that_gives_its_memory_away_between_steps_is_the_same_bit_for_bit(
    settings: MemorySettings, dtype: torch.dtype, world: World, model_folder: Path
) -> None:
    stays, goes = (new_trainer(world, model_folder, dtype=dtype) for _ in range(2))
    memory = TrainerMemory(goes, settings)
    for _ in range(3):
        memory.offload()  # the first time before there is any optimizer state
        memory.onload()
        assert step(stays) == step(goes)
    for one, other in zip(stays.policy.parameters(), goes.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    for mine, theirs in zip(optimizer_tensors(stays), optimizer_tensors(goes), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype, bytes_a_weight", [(torch.float32, 8), (torch.bfloat16, 12)])
def test_adams_moments_and_fp32_weights_leave_and_the_policys_own_weights_stay(
    dtype: torch.dtype, bytes_a_weight: int, world: World, model_folder: Path
) -> None:
    trainer = new_trainer(world, model_folder, dtype=dtype)
    step(trainer)
    num_weights = sum(weight.numel() for weight in trainer.policy.parameters())
    before = [weight.clone() for weight in trainer.policy.parameters()]
    memory = TrainerMemory(trainer, EVERYTHING)
    freed = memory.offload()
    gradients = sum(4 * buffer.numel() for buffer in gradient_buffers(trainer))
    assert gradients >= 4 * num_weights
    assert freed == pytest.approx(bytes_a_weight * num_weights + gradients, rel=1e-3)
    offloaded = optimizer_tensors(trainer) + gradient_buffers(trainer)
    assert len(offloaded) > 3 and all(tensor.untyped_storage().nbytes() == 0 for tensor in offloaded)
    assert all(
        torch.equal(one, other) for one, other in zip(before, trainer.policy.parameters(), strict=True)
    )
    memory.onload()
    assert all(tensor.untyped_storage().nbytes() for tensor in offloaded)
    assert not any(buffer.any() for buffer in gradient_buffers(trainer))


PHASES = """
import torch
from megatron_npr.runtime.peak_memory import peak_memory
for size in (200_000_000, 0, 100_000_000):
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(size, dtype=torch.uint8)
    print(peak.num_bytes)
"""


def test_the_peak_of_a_phase_is_its_own() -> None:
    """In a process of its own: here, garbage of other tests may be collected between two phases."""
    ran = subprocess.run([sys.executable, "-c", PHASES], capture_output=True, text=True, check=True)
    large, small, again = map(int, ran.stdout.split())
    assert 0.9 * 200_000_000 < large - small < 1.1 * 200_000_000
    assert 0.9 * 100_000_000 < again - small < 1.1 * 100_000_000


def figures(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Two rounds of stage 3 on the demo's base model."""
    words = [
        "--run.dir",
        str(folder),
        "--model.path",
        str(FOLDER),
        "--run.threads",
        "1",
        "--train.steps",
        "2",
    ]
    words += [
        "--rollout.prompts_per_step",
        "8",
        "--rollout.samples_per_prompt",
        "4",
        "--log.progress",
        "false",
    ]
    # Without branching it trains on malformed ones, too.
    words += ["--optimizer.warmup_steps", "0", "--rollout.branching", "false"]
    stage3.run(load_config(Stage3Config, DEMO, [*words, *overrides]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stage_three_is_the_same_with_every_saving_on(tmp_path: Path) -> None:
    savings = [f"--memory.{name}=true" for name in MemorySettings.model_fields]
    usual, saving = figures(tmp_path / "usual"), figures(tmp_path / "saving", *savings)
    assert len(usual) == 2 and any(line["grad_norm"] > 0 for line in usual), "a round that trains"
    assert any(line["entropy"] > 0 for line in usual)
    for mine, theirs in zip(usual, saving, strict=True):
        assert mine["rollout_memory_gb"] > 0.1 and mine["train_memory_gb"] > 0.1
        for name in ("loss", "grad_norm", "accuracy", "format_valid", "response_tokens", "nll", "entropy"):
            assert mine[name] == theirs[name] or mine[name] != mine[name], name
