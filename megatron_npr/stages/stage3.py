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
from megatron_npr.data.rounds import round_turns
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import mean, monitored
from megatron_npr.rl.advantage import Advantages, papo_advantages
from megatron_npr.rl.losses import LossSum, papo_loss
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.collect import collect, train_sample
from megatron_npr.rollout.scoring import Scored, agree_on_round, outcomes, score
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.learner import Learner
from megatron_npr.training.offload import peak_memory
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import open_session
from megatron_npr.training.trainer import StepReport
from npr_ext.errors import UserError


def run(config: Stage3Config) -> None:
    """Train, checkpoint, and leave the model in run.dir/model."""
    if config.train.updates_per_step != 1:
        raise UserError(
            f"train.updates_per_step = {config.train.updates_per_step}: stage 3 is strictly on-policy, one update a round; "
            "set it to 1 and raise train.steps"
        )
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
            num_updates=config.train.steps,
            entropy_coefficient=config.train.entropy_weight,
        )
        engine = learner.build_engine(config.rollout)
        identity = (config.run.seed, "stage3")
        total, first = config.train.steps, learner.first_step
        with monitored("stage 3", config.run, config.log, session.world, total=total, first=first) as monitor:
            for step in learner.steps(total):
                turns = round_turns(prompts, config.rollout.prompts_per_step, step, config.run.seed)
                with peak_memory(session.world.device) as rollout_peak, learner.rollout_memory(engine):
                    groups = collect(engine, session.world, turns, config.rollout, identity=identity)
                scored = score(session.world, session.grammar, verifier, groups, turns, config.rollout)
                kept = survivors(scored, config)
                advantages = papo_advantages(
                    np.array([item.accuracy_reward for item in kept]),
                    np.array([item.group for item in kept]),
                    epsilon=config.papo.std_epsilon,
                )
                agree_on_round(step, turns, scored, [] if advantages.skip else [advantages.values])
                with peak_memory(session.world.device) as train_peak:
                    report = None if advantages.skip else update(learner, kept, advantages, config)
                learner.update_engine(engine)
                monitor.step(
                    step,
                    tokens=sum(item.rollout.num_tokens for item in scored),
                    shown=("accuracy", "format_valid"),
                    shares=outcomes(scored) | unused(scored, kept, advantages),
                    accuracy=mean(item.correct for item in scored),
                    format_valid=mean(item.valid for item in scored),
                    skipped=float(advantages.skip),
                    response_tokens=mean(item.rollout.num_tokens for item in scored),
                    critical_path=mean(item.rollout.critical_path for item in scored),
                    loss=report.loss if report else float("nan"),
                    grad_norm=report.grad_norm if report else float("nan"),
                    nll=report.metrics["nll"] if report else float("nan"),
                    entropy=report.entropy if report else float("nan"),
                    train_seconds=report.seconds if report else 0.0,
                    imbalance=report.imbalance if report else float("nan"),
                    lr=learner.trainer.lr,
                    **learner.balance([report] if report else []),
                    rollout_memory_gb=rollout_peak.gb,
                    train_memory_gb=train_peak.gb,
                )
        learner.export(config.run.dir / "model")


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
    return learner.trainer.step(
        samples, objective, branching=config.rollout.branching, idle_targets=idle_targets
    )


def objective(log_probs: Tensor, row: PackedRow) -> LossSum:
    """PAPO on one row."""
    return papo_loss(log_probs, row.advantages.to(log_probs))
