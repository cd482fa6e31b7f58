"""A run of stage 3 whose two processes share the experts of both trainer and engine, against a run of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_npr.demo.base import FOLDER
from tests.support.launch import torchrun
from tests.support.places import CONFIGS

DEMO = CONFIGS / "demo" / "stage3.toml"
NUM_EXPERTS = 4


def save_upcycled(target: Path) -> Path:
    """The demo's base model with four experts instead of each MLP, every one that MLP and a little noise: a mixture that can
    do the demo's tasks (Komatsuzaki et al. 2023)."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FOLDER / name, target)
    config = json.loads((FOLDER / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config["intermediate_size"],
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (target / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in load_file(FOLDER / "model.safetensors").items():
        if ".mlp." not in name:
            weights[name] = weight
            continue
        for expert in range(NUM_EXPERTS):
            noise = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
            weights[name.replace(".mlp.", f".mlp.experts.{expert}.")] = weight + noise
    for layer in range(config["num_hidden_layers"]):
        router = torch.randn(NUM_EXPERTS, config["hidden_size"], generator=generator)
        weights[f"model.layers.{layer}.mlp.gate.weight"] = router
    save_file(weights, target / "model.safetensors")
    return target


def figures(model: Path, run: Path, processes: int, *overrides: str) -> list[dict[str, float]]:
    """Metrics of two rounds; three prompts, so that two engines decode two and one of them."""
    options = {
        "run.dir": run,
        "model.path": model,
        "data.mode": "sequential",  # what the base model can do: right and wrong answers in one group
        "rollout.prompts_per_step": 3,
        "rollout.samples_per_prompt": 8,
        "rollout.branching": "false",  # which trains on malformed responses, too
        "rollout.max_tokens": 96,
        "batch.micro_batch_tokens": 1024,
        "optimizer.warmup_steps": 0,
        "optimizer.lr": 1e-3,
        "train.steps": 2,
        "log.progress": "false",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    torchrun("megatron_npr", ["stage3", DEMO, *words, *overrides], processes)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_that_share_experts_train_as_one_does(tmp_path: Path) -> None:
    model = save_upcycled(tmp_path / "model")
    one = figures(model, tmp_path / "one", 1)
    shared = ["--parallel.ep", "2", "--rollout.tp", "1", "--rollout.ep", "2"]
    two = figures(model, tmp_path / "two", 2, *shared)
    assert len(one) == 2 and all(line["grad_norm"] > 0 for line in one), "both rounds train"
    for mine, theirs in zip(two, one, strict=True):
        for name in ("accuracy", "response_tokens", "dropped", "loss", "grad_norm", "nll"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
