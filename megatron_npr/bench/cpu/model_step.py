"""What a shared prompt saves in a whole training step: the policy's forward and backward, and the optimizer.

16 responses to one prompt ─► packed behind one copy, or with a copy each ─► Trainer.step, the same objective
"""

from __future__ import annotations

import statistics

import numpy as np
import torch

from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.data.packing import TrainSample, plan_rows
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.rl.losses import papo_loss
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.step_report import StepReport
from megatron_npr.training.trainer import Trainer
from npr_engine.model.transformer import ModelConfig
from npr_ext.testing import TAGS, random_layout

GROUP, PROMPT, RESPONSE, BRANCHES = 16, 512, 256, 5
ROW_TOKENS = PROMPT + GROUP * RESPONSE
SMALL_MODEL = ModelConfig(
    num_layers=4,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_hidden_size=1536,
    vocab_size=2048,
)
"""Four layers of SmolLM2-135M's shape."""


def measure() -> dict[str, float]:
    """Seconds of a step (median of three after one), shared and not, and how far apart the two gradient norms are."""
    with world_of() as world:
        samples = group()
        shared, unshared = (_steps(world, samples, share_prompts) for share_prompts in (True, False))
    tokens = {share: _tokens(samples, share) for share in (True, False)}
    norm, other_norm = shared[0].grad_norm, unshared[0].grad_norm
    return {
        "shared_seconds": _median(shared),
        "unshared_seconds": _median(unshared),
        "times_faster": _median(unshared) / _median(shared),
        "tokens_allow": tokens[False] / tokens[True],
        "gradient_norm_difference": abs(norm - other_norm) / other_norm,
    }


def response_ids(seed: int) -> torch.Tensor:
    """RESPONSE tokens: one block of 5 branches, then a conclusion."""
    sample = random_layout(seed, RESPONSE, 1, BRANCHES, 0.6)
    ids = sample.token_ids[sample.prompt_length :]
    return torch.cat([ids, torch.full((RESPONSE - len(ids),), 20)])


def group() -> list[TrainSample]:
    """GROUP responses to a prompt; every token is trained."""
    prompt = np.full(PROMPT, 20, np.int32)
    advantages = np.random.default_rng(0).normal(size=GROUP)
    return [
        TrainSample.whole(prompt, response_ids(index).numpy().astype(np.int32), float(advantage))
        for index, advantage in enumerate(advantages)
    ]


def _steps(
    world: World, samples: list[TrainSample], share_prompts: bool, repeats: int = 4
) -> list[StepReport]:
    torch.manual_seed(0)
    trainer = Trainer(
        build_policy(SMALL_MODEL, world),
        world,
        optimizer=OptimizerSettings(lr=1e-6, schedule="constant"),
        batch=BatchSettings(micro_batch_tokens=ROW_TOKENS, share_prompts=share_prompts),
        tags=TAGS,
        pad_id=0,
        num_updates=repeats,
    )
    return [
        trainer.step(samples, lambda log_probs, row: papo_loss(log_probs, row.advantages), branching=True)
        for _ in range(repeats)
    ]


def _tokens(samples: list[TrainSample], share_prompts: bool) -> int:
    rows = plan_rows(samples, row_tokens=ROW_TOKENS, share_prompts=share_prompts)
    return sum(row.num_tokens for row in rows)


def _median(reports: list[StepReport]) -> float:
    return statistics.median(report.seconds for report in reports[1:])
