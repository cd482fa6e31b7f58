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
from megatron_npr.data.rounds import round_turns
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import mean, monitored
from megatron_npr.rl.advantage import flat_groups, grpo_advantages
from megatron_npr.rl.losses import LossSum, dapo_loss
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.collect import collect, train_sample
from megatron_npr.rollout.scoring import Scored, agree_on_round, outcomes, score
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.learner import Learner
from megatron_npr.training.offload import peak_memory
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import open_session


def run(config: Stage1Config) -> None:
    """Train, checkpoint, and leave the model in run.dir/model."""
    session = open_session(config, config.run, config.model, config.parallel)
    with Verifier() as verifier:
        prompts = training_prompts(session, config.data)
        check_rollout_room(session, prompts, config.data, config.rollout, config.batch)
        learner = Learner(
            session,
            optimizer=config.optimizer,
            batch=config.batch,
            checkpoint=config.checkpoint,
            fp8=config.fp8,
            memory=config.memory,
            num_updates=config.train.steps * config.train.updates_per_step,
            entropy_coefficient=config.train.entropy_weight,
        )
        engine = learner.build_engine(config.rollout)
        objective = partial(objective_of, settings=config.dapo)
        identity = (config.run.seed, "stage1")
        total, first = config.train.steps, learner.first_step
        with monitored("stage 1", config.run, config.log, session.world, total=total, first=first) as monitor:
            for step in learner.steps(total):
                turns = round_turns(prompts, config.rollout.prompts_per_step, step, config.run.seed)
                with peak_memory(session.world.device) as rollout_peak, learner.rollout_memory(engine):
                    groups = collect(engine, session.world, turns, config.rollout, identity=identity)
                scored = score(session.world, session.grammar, verifier, groups, turns, config.rollout)
                rewards = np.array([reward(item, config) for item in scored])
                updates = split_updates(scored, rewards, config)
                agree_on_round(step, turns, scored, [advantages_of(update) for update in updates])
                with peak_memory(session.world.device) as train_peak:
                    reports = [learner.trainer.step(update, objective, branching=False) for update in updates]
                learner.update_engine(engine)
                monitor.step(
                    step,
                    tokens=sum(item.rollout.num_tokens for item in scored),
                    shown=("format_valid", "accuracy"),
                    shares=outcomes(scored) | {"flat_groups": share_of_flat(rewards, scored)},
                    reward=float(rewards.mean()),
                    format_reward=mean(item.format for item in scored),
                    format_valid=mean(item.valid for item in scored),
                    accuracy=mean(item.correct for item in scored),
                    response_tokens=mean(item.rollout.num_tokens for item in scored),
                    updates=len(reports),
                    trained_samples=sum(len(update) for update in updates),
                    loss=mean(report.loss for report in reports),
                    grad_norm=mean(report.grad_norm for report in reports),
                    clipped=mean(report.metrics["clipped"] for report in reports),
                    entropy=mean(report.entropy for report in reports),
                    train_seconds=sum(report.seconds for report in reports),
                    imbalance=mean(report.imbalance for report in reports),
                    lr=learner.trainer.lr,
                    **learner.balance(reports),
                    rollout_memory_gb=rollout_peak.gb,
                    train_memory_gb=train_peak.gb,
                )
        learner.export(config.run.dir / "model")


def reward(item: Scored, config: Stage1Config) -> float:
    """Format + accuracy, the latter only where the format is right (REFERENCE.md, stage 1), + overlong shaping.

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


def advantages_of(update: Sequence[TrainSample]) -> np.ndarray:
    """Of the samples of an update, [n]."""
    return np.array([sample.advantage for sample in update])


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
