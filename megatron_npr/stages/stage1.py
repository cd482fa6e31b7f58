"""Stage 1, NPR-Zero: discover the parallel format by RL (DAPO), decoded sequentially under plain causal attention.

problems ─► engine (no forks) ─► format + accuracy reward ─► group advantages ─► DAPO updates ─► engine weights ─┐
    ▲                                                                                                           │
    └───────────────────────────────────────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import numpy as np
from torch import Tensor

from megatron_npr.config import DapoSettings, Stage1Config
from megatron_npr.data.packing import PackedRow, TrainSample
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import mean
from megatron_npr.rl.advantage import flat_groups, grpo_advantages
from megatron_npr.rl.losses import LossSum, dapo_loss
from megatron_npr.rollout.collect import train_sample
from megatron_npr.rollout.scoring import Scored, invalid
from megatron_npr.stages.rl_stage import open_rl_stage
from megatron_npr.training.step_report import StepReport


def run(config: Stage1Config) -> None:
    """Train, checkpoint, and leave the model in run.dir/model."""
    num_updates = config.train.steps * config.train.updates_per_step
    objective = partial(objective_of, settings=config.dapo)
    with open_rl_stage(config, "stage 1", num_updates=num_updates) as stage:
        for step in stage.steps():
            done = stage.rollout(step)
            rewards = np.array([reward(item, config) for item in done.scored])
            updates = split_updates(done.scored, rewards, config)
            done.agree([np.array([sample.advantage for sample in update]) for update in updates])
            reports = [stage.learner.trainer.step(update, objective, branching=False) for update in updates]
            stage.finish(
                done,
                metrics(done.scored, rewards, updates, reports),
                reports=reports,
                shares={
                    "invalid": invalid(done.scored),
                    "flat_groups": share_of_flat(rewards, done.scored),
                },
            )


def metrics(
    scored: Sequence[Scored],
    rewards: np.ndarray,
    updates: Sequence[Sequence[TrainSample]],
    reports: Sequence[StepReport],
) -> dict[str, float]:
    """What only this stage measures of a step."""
    return {
        "reward": float(rewards.mean()),
        "format_reward": mean(item.format for item in scored),
        "updates": len(updates),
        "trained_samples": sum(len(update) for update in updates),
        "clipped": mean(report.metrics["clipped"] for report in reports),
    }


def reward(item: Scored, config: Stage1Config) -> float:
    """Format + accuracy, the latter only where the format is right (megatron_npr/README.md, stage 1), + overlong shaping.

    Summed as fractions and rounded once, so that equal rewards are equal floats, whatever they are sums of.
    """
    format_reward = Fraction(item.format).limit_denominator(10)  # tenths
    accuracy = Fraction(item.accuracy_reward if format_reward == 0 else 0.0)
    return float(
        format_reward + accuracy + overlong(item.rollout.num_tokens, config.rollout.max_tokens, config.dapo)
    )


def overlong(num_tokens: int, max_tokens: int, settings: DapoSettings) -> Fraction:
    """DAPO's soft punishment (equation 13): from 0 to -1 over the last `overlong_buffer` tokens of the budget."""
    if settings.overlong_buffer == 0:
        return Fraction(0)
    excess = num_tokens - (max_tokens - settings.overlong_buffer)
    return -min(max(Fraction(excess, settings.overlong_buffer), Fraction(0)), Fraction(1))


def split_updates(
    scored: Sequence[Scored], rewards: np.ndarray, config: Stage1Config
) -> list[list[TrainSample]]:
    """The round's samples with their advantages, groups kept together, in `updates_per_step` parts; none empty.

    Dynamic sampling (DAPO, section 3.2) leaves out the groups whose rewards are all equal.
    """
    groups = np.array([item.group for item in scored])
    advantages, flat = grpo_advantages(rewards, groups).values, flat_groups(rewards, groups)
    parts: list[list[TrainSample]] = [[] for _ in range(config.train.updates_per_step)]
    for group in range(int(groups.max()) + 1):
        members = np.flatnonzero(groups == group).tolist()
        if config.dapo.dynamic_sampling and flat[members].all():
            continue
        part = parts[group * len(parts) // (int(groups.max()) + 1)]
        part += [train_sample(scored[index].rollout, float(advantages[index])) for index in members]
    return [part for part in parts if part]


def share_of_flat(rewards: np.ndarray, scored: Sequence[Scored]) -> Share:
    """Groups that teach nothing."""
    groups = np.array([item.group for item in scored])
    return Share(len(np.unique(groups[flat_groups(rewards, groups)])), len(np.unique(groups)))


def objective_of(log_probs: Tensor, row: PackedRow, *, settings: DapoSettings) -> LossSum:
    """DAPO on one row."""
    return dapo_loss(
        log_probs,
        row.old_log_probs.to(log_probs),
        row.advantages.to(log_probs),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
