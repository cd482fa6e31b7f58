"""What the two RL stages share: their set-up, and the first and last third of a step.

problems of the step ─► engine ─► rollouts, each judged once ─► the stage's own updates ─► weight sync ─► metrics
└───────────────────── RlStage.rollout ────────────────────┘                             └─ RlStage.finish ─┘
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_npr.config import RlConfig
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.data.rounds import Turn, round_turns
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import Monitor, mean, monitored
from megatron_npr.monitoring.spans import span
from megatron_npr.rl.agreement import Agreement
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.collect import collect
from megatron_npr.rollout.scoring import Scored, agree_on_round, outcomes, score
from megatron_npr.runtime.peak_memory import peak_memory
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.learner import Learner
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import Session, open_session
from megatron_npr.training.step_report import StepReport
from npr_engine.backend import Backend
from npr_ext.errors import UserError

SAMPLER_SHIFT = "sampler_shift"
"""Metric: mean over responses of the mean |log-prob under the distribution sampled from - under the policy|: what
temperature, truncation and penalty add to any difference between engine and trainer."""


@dataclass(frozen=True)
class RolloutRound:
    """The judged rollouts of one step, turn by turn, the same on every rank; `memory_gb`: the peak while they were made."""

    step: int
    turns: Sequence[Turn]
    scored: list[Scored]
    memory_gb: float

    def agree(self, updates: Sequence[NDArray[np.float64]]) -> None:
        """Stop with a line where ranks differ in these rollouts, or in the advantages of the updates to come; collective."""
        agree_on_round(self.step, self.turns, self.scored, updates)

    def metrics(self) -> dict[str, float]:
        """What every round is measured by."""
        sampled = [item.rollout for item in self.scored if not item.rollout.forced.all()]
        return {
            "accuracy": mean(item.correct for item in self.scored),
            "format_valid": mean(item.valid for item in self.scored),
            "response_tokens": mean(item.rollout.num_tokens for item in self.scored),
            "rollout_memory_gb": self.memory_gb,
            SAMPLER_SHIFT: mean(np.nanmean(np.abs(one.sampler_logprobs - one.logprobs)) for one in sampled),
        }


@dataclass(frozen=True)
class RlStage:
    """An RL stage on this rank: policy, engine over its weights, verifier, problems, and who watches."""

    config: RlConfig
    session: Session
    learner: Learner
    engine: Backend
    verifier: Verifier
    prompts: Sequence[EncodedProblem]
    monitor: Monitor

    def steps(self) -> Iterator[int]:
        """The steps that are left, with checkpoints between them (see `Learner.steps`)."""
        return self.learner.steps(self.config.train.steps)

    def rollout(self, step: int) -> RolloutRound:
        """Sample this step's problems and judge the responses; collective."""
        config, world = self.config, self.session.world
        turns = round_turns(self.prompts, config.rollout.prompts_per_step, step, config.run.seed)
        identity = (config.run.seed, config.command)
        memory = self.learner.rollout_memory(self.engine, config.memory)
        with span("rollout"), peak_memory(world.device) as peak, memory:
            groups = collect(self.engine, world, turns, config.rollout, identity=identity)
        scored = score(world, self.session.grammar, self.verifier, groups, turns, config.rollout)
        return RolloutRound(step, turns, scored, peak.gb)

    def finish(
        self,
        done: RolloutRound,
        values: dict[str, float],
        *,
        reports: Sequence[StepReport],
        shares: dict[str, Share],
    ) -> None:
        """The engine has the new weights, and whoever watches the step's figures; collective."""
        self.learner.update_engine(self.engine)
        # Later updates of a step have moved away from the weights that sampled.
        agreement = reports[0].agreement if reports else Agreement.of({})
        own = {"entropy": mean(report.entropy for report in reports)} | agreement.metrics()
        self.monitor.step(
            done.step,
            done.metrics() | self.learner.metrics(reports) | own | values,
            tokens=sum(item.rollout.num_tokens for item in done.scored),
            shown=("accuracy", "format_valid"),
            shares=outcomes(done.scored) | shares,
        )
        self._watch(done.step, agreement)

    def _watch(self, step: int, agreement: Agreement) -> None:
        """UserError where trainer and engine differ more than train.agreement_limit allows; the same on every rank."""
        settings = self.config.train
        self.monitor.warn_above(step, "agreement/mean", agreement.mean, settings.agreement_warning)
        if 0 < settings.agreement_limit < agreement.mean:
            parts = ", ".join(
                f"{part.name.lower()} {mean:.3g}" for part, (mean, _) in agreement.segments.items()
            )
            raise UserError(
                f"step {step}: log-probs of trainer and engine differ by {agreement.mean:.3g} in the mean ({parts}), more than"
                f" train.agreement_limit = {settings.agreement_limit:g}: see which part differs, or raise the limit; the last"
                " checkpoint stays"
            )


@contextlib.contextmanager
def open_rl_stage(config: RlConfig, title: str, *, num_updates: int) -> Iterator[RlStage]:
    """Everything that a stage's loop needs; `title` is shown.

    At the end of the with-block the model is in run.dir/model. Collective.
    """
    session = open_session(config)
    with Verifier() as verifier:
        prompts = training_prompts(session, config.data)
        check_rollout_room(session, prompts, config.data, config.rollout, config.batch)
        entropy_coefficient = config.train.entropy_weight
        learner = Learner(session, config, num_updates=num_updates, entropy_coefficient=entropy_coefficient)
        engine = learner.build_engine(config.rollout)
        total, first = config.train.steps, learner.first_step
        with monitored(title, config.run, config.log, session.world, total=total, first=first) as monitor:
            yield RlStage(config, session, learner, engine, verifier, prompts, monitor)
        learner.export()
