"""`make base`: the demo's base model from nothing, by the project's own trainer on plain causal layouts.

base_sequences (gold solutions, this once) ─► Trainer ─► Hugging Face folder in megatron_npr/assets
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3Config

from megatron_npr.config import BatchSettings, LogSettings, OptimizerSettings, RunSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer, save_demo_tokenizer
from megatron_npr.demo import base
from megatron_npr.hf.huggingface import export_model, read_model_config
from megatron_npr.hf.model_folder import check_target
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.monitoring.monitor import Monitor, monitored
from megatron_npr.rl.losses import sft_loss
from megatron_npr.runtime.process_world import init_world
from megatron_npr.training.engine_weights import full_weights
from megatron_npr.training.trainer import Trainer
from npr_engine.language.vocabulary import Vocabulary
from npr_ext.errors import UserError

OPTIMIZER = OptimizerSettings(
    lr=base.LR,
    schedule="constant",
    warmup_steps=base.WARMUP_UPDATES,
    weight_decay=base.WEIGHT_DECAY,
    beta1=base.BETAS[0],
    beta2=base.BETAS[1],
    grad_clip=base.GRAD_CLIP,
)


def run(out: Path, *, seed: int = 0, stop_loss: float = base.STOP_LOSS, replace: bool = False) -> None:
    """Train until the running loss is at `stop_loss`, then write the folder `out`, whole; `replace` a model that is there."""
    check_target(out, replace=replace)  # before the work
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_source(source)
        world = init_world(seed=seed)
        torch.manual_seed(seed)
        vocabulary = Vocabulary.from_tokenizer(demo_tokenizer())
        policy = build_policy(read_model_config(source), world)
        trainer = Trainer(
            policy,
            world,
            optimizer=OPTIMIZER,
            batch=BatchSettings(micro_batch_tokens=8192, share_prompts=False),
            tags=vocabulary.tags,
            pad_id=vocabulary.eos_id,
            num_updates=base.MAX_UPDATES,
        )
        sequences = base.base_sequences(seed)
        log, run_settings = LogSettings(backend="none"), RunSettings(dir=source / "run", seed=seed)
        with monitored("base", run_settings, log, world, total=base.MAX_UPDATES) as monitor:
            losses = running_losses(trainer, sequences, monitor)
            reached = any(loss <= stop_loss for loss in losses)  # draws no update more than it needs
        if not reached:
            raise UserError(
                f"the base model's loss is not at {stop_loss} after {base.MAX_UPDATES} updates: "
                "try another --seed"
            )
        export_model(full_weights(policy), policy.model_config, source, out, replace=replace)


def running_losses(
    trainer: Trainer, sequences: Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]], monitor: Monitor
) -> Iterator[float]:
    """One update for each value drawn."""
    running = float("nan")
    for step in range(base.MAX_UPDATES):
        report = trainer.step(next_batch(sequences), lambda lp, row: sft_loss(lp), branching=False)
        running = report.loss if step == 0 else running + (1 - base.LOSS_MEMORY) * (report.loss - running)
        monitor.step(step, {"loss": running, "lr": report.lr}, tokens=report.num_tokens, shown=("loss",))
        yield running


def write_source(folder: Path) -> None:
    """Tokenizer and config.json of the model to be."""
    save_demo_tokenizer(folder)
    tokenizer = demo_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
        torch_dtype="float32",
        **base.ARCHITECTURE,
    )
    config.save_pretrained(str(folder))


def next_batch(sequences: Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> list[TrainSample]:
    """The sequences of one update; the loss is on the responses."""
    return [
        TrainSample.whole(prompt, response)
        for prompt, response in itertools.islice(sequences, base.SEQUENCES_PER_UPDATE)
    ]
