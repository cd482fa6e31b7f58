"""`npr bench step --against transformers`: an SFT update on branch layouts, ours and a transformers user's, in turns.

random model, saved once ─► both load it ─► warm-up ─► pairs of updates ─► medians, median ratio, both first losses
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_npr.bench.contenders.transformers_step import TransformersTrainer, model_of
from megatron_npr.bench.cpu.model_step import SMALL_MODEL
from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.rl.losses import sft_loss
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.trainer import Trainer
from npr_ext.library import cpu_isa
from npr_ext.testing import TAGS, random_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 1e-6
VOCABULARY = 8192
ROW_TOKENS = 8192


@dataclass(frozen=True)
class StepBench:
    """`shapes`: (sequences, tokens of each); `pairs` of updates are timed for each of them."""

    shapes: tuple[tuple[int, int], ...]
    dtype: str
    layers: int
    pairs: int


def measure(bench: StepBench) -> dict[str, object]:
    """Seconds of an update and how many times faster ours is, for each shape, as JSON data."""
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": cpu_isa(),
        "dtype": bench.dtype,
        "layers": bench.layers,
        "shapes": [_compare(bench, sequences, tokens) for sequences, tokens in bench.shapes],
    }


def _compare(bench: StepBench, sequences: int, tokens: int) -> dict[str, object]:
    data = [random_layout(seed, tokens, 1, 5, 0.6) for seed in range(sequences)]
    with tempfile.TemporaryDirectory() as folder, world_of() as world:
        shape = replace(SMALL_MODEL, num_layers=bench.layers, vocab_size=VOCABULARY)
        model = model_of(shape, positions=tokens, dtype=DTYPES[bench.dtype])
        model.save_pretrained(folder)
        theirs = TransformersTrainer(model, [(one.token_ids, one.prompt_length) for one in data], lr=LR)
        trainer = _trainer(Path(folder), world, DTYPES[bench.dtype])
        samples = [
            TrainSample.whole(ids[: one.prompt_length], ids[one.prompt_length :])
            for one in data
            for ids in [one.token_ids.numpy().astype(np.int32)]
        ]

        def ours() -> float:
            return trainer.step(samples, lambda log_probs, row: sft_loss(log_probs), branching=True).loss

        losses = [ours(), theirs.step()]  # of the same weights
        pairs = [(_seconds(ours), _seconds(theirs.step)) for _ in range(bench.pairs)]
    return {
        "sequences": sequences,
        "tokens": tokens,
        "seconds": statistics.median(own for own, _ in pairs),
        "transformers_seconds": statistics.median(other for _, other in pairs),
        "times_faster": statistics.median(other / own for own, other in pairs),
        "losses": losses,
    }


def _trainer(folder: Path, world: World, dtype: torch.dtype) -> Trainer:
    policy = build_policy(read_model_config(folder), world, dtype=dtype)
    load_policy_weights(policy, folder)
    return Trainer(
        policy,
        world,
        optimizer=OptimizerSettings(lr=LR, schedule="constant"),
        batch=BatchSettings(micro_batch_tokens=ROW_TOKENS),
        tags=TAGS,
        pad_id=0,
        num_updates=1000,
    )


def _seconds(update: Callable[[], object]) -> float:
    began = time.perf_counter()
    update()
    return time.perf_counter() - began
