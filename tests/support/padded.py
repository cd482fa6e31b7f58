"""The demo's model as people have theirs, with vocabulary rows behind the tokenizer and a second id that ends responses;
and what an engine and a trainer make of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_npr.config import Stage3Config, load_config
from megatron_npr.data.rounds import Turn
from megatron_npr.demo.base import FOLDER
from megatron_npr.rl.losses import papo_loss
from megatron_npr.rollout.collect import collect, train_sample
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.learner import Learner
from megatron_npr.training.session import open_session
from npr_engine.language.grammar import Grammar
from npr_engine.rollout import Rollout
from tests.support.places import CONFIGS

DEMO = CONFIGS / "demo" / "stage3.toml"
EMBEDDING = "model.embed_tokens.weight"
SIZE = 340  # ids of the demo's tokenizer
NUM_PADDED = 45  # no tensor-parallel size divides the sum
SETTINGS = {
    "run.threads": 1,
    "rollout.prompts_per_step": 4,
    "rollout.samples_per_prompt": 8,
    "rollout.max_tokens": 200,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
}


def padded_folder(place: Path, *, num_padded: int = NUM_PADDED, second_eos: bool = False) -> Path:
    """The demo's base model with rows that it wants to sample, louder copies of those of words and tags, behind the tokenizer.

    With `second_eos` generation_config.json names the padding token beside EOS; its row is a copy of EOS's, so that about
    every second response ends with it.
    """
    shutil.copytree(FOLDER, place)
    weights = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    rows = weights[EMBEDDING]
    if second_eos:
        rows[config["pad_token_id"]] = rows[config["eos_token_id"]]
        ids = [config["eos_token_id"], config["pad_token_id"]]
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    weights[EMBEDDING] = torch.cat((rows, rows[SIZE - num_padded :][:num_padded] * 1.1))
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config | {"vocab_size": len(weights[EMBEDDING])}))
    return place


@dataclass(frozen=True)
class Round:
    """Rollouts, the trainer's log-probs of them, the gradient norm of an update on them, and the exported embedding [V, D].

    `compared`: sampled tokens up to the first tag that may not stand where it does; behind it the layout is none.
    """

    rollouts: list[Rollout]
    compared: list[NDArray[np.bool_]]
    log_probs: list[NDArray[np.float32]]
    grad_norm: float
    embedding: Tensor


def play_round(model: Path, run: Path, *overrides: str) -> Round:
    """One round of stage 3; collective, the embedding is read on every rank."""
    settings = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    settings += ["--run.dir", str(run), "--model.path", str(model), *overrides]
    config = load_config(Stage3Config, DEMO, settings)
    session = open_session(config)
    learner = Learner(session, config, num_updates=4, entropy_coefficient=0.01)
    engine = learner.build_engine(config.rollout)
    prompts = training_prompts(session, config.data)[: config.rollout.prompts_per_step]
    turns = [Turn(prompt) for prompt in prompts]
    groups = collect(engine, session.world, turns, config.rollout, identity=("test",))
    rollouts = [rollout for group in groups for rollout in group]
    samples = [train_sample(rollout, (-1.0) ** index) for index, rollout in enumerate(rollouts)]
    log_probs = learner.trainer.log_probs(samples, branching=True)
    report = learner.trainer.step(samples, lambda lp, row: papo_loss(lp, row.advantages), branching=True)
    learner.export()
    embedding = load_file(run / "model" / "model.safetensors")[EMBEDDING]
    compared = [compared_tokens(session.grammar, rollout) for rollout in rollouts]
    return Round(rollouts, compared, log_probs, report.grad_norm, embedding)


def compared_tokens(grammar: Grammar, rollout: Rollout) -> NDArray[np.bool_]:
    """Bool [R], see Round."""
    broken = grammar.read(rollout.token_ids).structural
    within = rollout.num_tokens if broken is None else broken.token_index
    return ~rollout.forced & (np.arange(rollout.num_tokens) < within)
