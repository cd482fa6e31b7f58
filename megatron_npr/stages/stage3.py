"""Stage 3, NPR: PAPO, on-policy RL of the branching itself, with rollouts of the colocated engine.

    problems ─► engine (fork / join) ─► schema filter ─► accuracy reward ─► batch-normalised advantages ─► ONE update
        ▲                                                                                                    │
        └─────────────────────── engine weights (zero copy where layouts agree) ◄────────────────────────────┘

With `rollout.branching = false` the same loop is plain RL without branches: the control.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_npr.config import Stage3Config
from megatron_npr.data.packing import PackedRow
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import mean
from megatron_npr.rl.advantage import Advantages, papo_advantages
from megatron_npr.rl.losses import LossSum, papo_loss
from megatron_npr.rollout.collect import train_sample
from megatron_npr.rollout.scoring import Scored
from megatron_npr.stages.rl_stage import open_rl_stage
from megatron_npr.training.learner import Learner
from megatron_npr.training.step_report import StepReport


def run(config: Stage3Config) -> None:
    """Train, checkpoint, and leave the model in run.dir/model."""
    with open_rl_stage(config, "stage 3", num_updates=config.train.steps) as stage:
        for step in stage.steps():
            done = stage.rollout(step)
            kept = survivors(done.scored, config)
            rewards = np.array([item.accuracy_reward for item in kept])
            prompts = np.array([item.group for item in kept])
            advantages = papo_advantages(rewards, prompts, epsilon=config.papo.std_epsilon)
            done.agree([] if advantages.skip else [advantages.values])
            reports = [] if advantages.skip else [update(stage.learner, kept, advantages, config)]
            stage.finish(
                done,
                metrics(done.scored, advantages, reports),
                reports=reports,
                shares=unused(done.scored, kept, advantages),
            )


def metrics(scored: list[Scored], advantages: Advantages, reports: list[StepReport]) -> dict[str, float]:
    """What only this stage measures of a step; `reports` of the one update, if there was one."""
    return {
        "skipped": float(advantages.skip),
        "critical_path": mean(item.rollout.critical_path for item in scored),
        "nll": mean(report.metrics["nll"] for report in reports),
    }


def unused(scored: list[Scored], kept: list[Scored], advantages: Advantages) -> dict[str, Share]:
    """Responses that the filter dropped, and groups that teach nothing."""
    return {
        "dropped": Share(len(scored) - len(kept), len(scored)),
        "flat_groups": Share(advantages.num_flat_groups, advantages.num_groups),
        "single_groups": Share(advantages.num_single_groups, advantages.num_groups),
    }


def survivors(scored: list[Scored], config: Stage3Config) -> list[Scored]:
    """The schema filter: malformed and cut responses are dropped before grouping.

    Without branches there is no schema: every response that ended by itself stays.
    """
    if config.rollout.branching:
        return [item for item in scored if item.valid]
    return [item for item in scored if item.rollout.finish_reason == "eos"]


def update(learner: Learner, kept: list[Scored], advantages: Advantages, config: Stage3Config) -> StepReport:
    """One strictly on-policy update; responses of zero advantage push nothing (but towards entropy, where that is asked
    for) and count in the token mean."""
    samples, idle_targets = [], 0
    for item, value in zip(kept, advantages.values, strict=True):
        sample = train_sample(item.rollout, float(value), train_forced=config.papo.train_forced)
        if value or config.papo.train_forced or config.train.entropy_coefficient:
            samples.append(sample)
        else:
            idle_targets += int(sample.loss_mask.sum())
    branching = config.rollout.branching
    return learner.trainer.step(samples, objective, branching=branching, idle_targets=idle_targets)


def objective(log_probs: Tensor, row: PackedRow) -> LossSum:
    """PAPO on one row."""
    return papo_loss(log_probs, row.advantages.to(log_probs))
