"""How evenly experts are loaded is a metric of each stage that balances them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_npr.cli import main
from megatron_npr.data.packing import TrainSample
from megatron_npr.monitoring.metrics import read_metrics
from megatron_npr.runtime.process_world import close_world
from tests.e2e.test_expert_parallel_run import save_upcycled
from tests.support.places import CONFIGS
from tests.unit.model.test_load_balance import truth

DEMO = CONFIGS / "demo"
ROLLOUTS = {
    "rollout.prompts_per_step": 3,
    "rollout.samples_per_prompt": 8,
    "batch.micro_batch_tokens": 1024,
    "train.steps": 1,
    "model.router_aux_loss": 0.01,
}
TRAINS = {
    "stage1": {"rollout.max_tokens": 12, "dapo.dynamic_sampling": "false"},
    # What the base model can do: right and wrong answers in one group.
    "stage3": {"rollout.max_tokens": 96, "data.mode": "sequential", "rollout.branching": "false"},
}


@pytest.fixture(autouse=True)
def _leave_the_world() -> Iterator[None]:
    yield
    close_world()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_upcycled(tmp_path_factory.mktemp("upcycled") / "model")


def first_step(stage: str, model: Path, run: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a stage's first step."""
    fixed = {"run.dir": run, "model.path": model, "run.threads": 1, "model.dtype": "fp32"}
    fixed["log.progress"] = "false"
    words = [word for name, value in {**fixed, **options}.items() for word in (f"--{name}", str(value))]
    assert main([stage, str(DEMO / f"{stage}.toml"), *words]) == 0
    return dict(read_metrics(run / "metrics.jsonl")[0])


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_fine_tuning_tells_the_balance_that_transformers_routers_have(
    model: Path, tmp_path: Path, weight: float
) -> None:
    rng = np.random.default_rng(0)
    prompt, response = (rng.integers(20, 120, count).tolist() for count in (6, 40))
    record = {"problem_id": "a", "prompt_ids": prompt, "response_ids": response, "text": ""}
    data = tmp_path / "samples.jsonl"
    data.write_text(json.dumps({"format_version": 1, **record}) + "\n")
    options = {"sft.data": data, "train.steps": 1, "train.global_batch": 1, "model.router_aux_loss": weight}
    metrics = first_step("stage2", model, tmp_path / "run", options)
    if not weight:
        assert "load_balance" not in metrics
        return
    count = len(response)
    sample = TrainSample(
        np.array(prompt, np.int32),
        np.array(response, np.int32),
        np.ones(count, np.bool_),
        np.zeros(count, np.float32),
    )
    assert metrics["load_balance"] == pytest.approx(truth(model, [sample]).load_balance, rel=1e-5)


@pytest.mark.parametrize("stage", ["stage1", pytest.param("stage3", marks=pytest.mark.slow)])
def test_rl_tells_the_balance_of_a_step_that_trained(model: Path, tmp_path: Path, stage: str) -> None:
    metrics = first_step(stage, model, tmp_path / "run", {**ROLLOUTS, **TRAINS[stage]})
    assert metrics["loss"] is not None, "the step trained"
    assert 0.9 < metrics["load_balance"] < 2.0  # 4 / 2 where two of four experts get every token


def test_rl_tells_no_balance_of_a_step_that_did_not_train(model: Path, tmp_path: Path) -> None:
    metrics = first_step("stage3", model, tmp_path / "run", {**ROLLOUTS, "rollout.max_tokens": 4})
    assert metrics["loss"] is None and metrics["load_balance"] is None
