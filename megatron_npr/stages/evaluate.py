"""Evaluation: accuracy, validity, genuine parallelism and speed of one model on held-out problems.

    prompts of a mode ─► engine (seeded by row and sample) ─► scores + execution trace ─► Evaluation ─► eval.json

Modes: "parallel" (the engine forks and joins), "unforced" (the same prompt, decoded as one plain sequence: nothing is forced),
"sequential" (the sequential instruction, one plain sequence).

Shape legend: P problems, S samples of each.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_npr.config import EvalConfig, EvalMode, RolloutSettings
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.data.rounds import Turn
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import monitored
from megatron_npr.monitoring.statistics import mean_pass_at_k, mean_with_interval
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.collect import collect
from megatron_npr.rollout.rollout_file import write_rollouts
from megatron_npr.rollout.scoring import outcomes, score
from megatron_npr.run_folder.claim import JOURNAL
from megatron_npr.runtime.whole_file import write_whole
from megatron_npr.stages.journal import Journal
from megatron_npr.stages.prompt_sets import evaluation_prompts
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import Session, folder_engine, open_session
from npr_engine.backend import Backend
from npr_engine.rollout import Rollout
from npr_engine.trace import ran_in_parallel


@dataclass(frozen=True)
class Evaluation:
    """What one model did in one mode, [P, S] each; `seconds` of generation alone, `outcomes`: see `scoring.outcomes`."""

    correct: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    parallel: NDArray[np.bool_]
    num_tokens: NDArray[np.int64]
    critical_path: NDArray[np.int64]
    reasons: dict[str, int]
    outcomes: dict[str, Share]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return float(self.num_tokens.sum()) / self.seconds


def evaluate(
    session: Session,
    engine: Backend,
    verifier: Verifier,
    prompts: Sequence[EncodedProblem],
    settings: RolloutSettings,
    *,
    identity: tuple[int | str, ...],
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, list[list[Rollout]]]:
    """`settings.samples_per_prompt` responses for each prompt, and what they are worth."""
    began = time.perf_counter()
    turns = [Turn(prompt) for prompt in prompts]
    groups = collect(engine, session.world, turns, settings, identity=identity, on_progress=on_progress)
    seconds = time.perf_counter() - began
    scored = score(session.world, session.grammar, verifier, groups, turns, settings)
    shape = (len(prompts), settings.samples_per_prompt)
    outcome = Evaluation(
        correct=np.array([item.correct for item in scored]).reshape(shape),
        valid=np.array([item.valid for item in scored]).reshape(shape),
        parallel=np.array([item.valid and ran_in_parallel(item.rollout) for item in scored]).reshape(shape),
        num_tokens=np.array([item.rollout.num_tokens for item in scored]).reshape(shape),
        critical_path=np.array([item.rollout.critical_path for item in scored]).reshape(shape),
        reasons=dict(Counter(item.rollout.finish_reason for item in scored).most_common()),
        outcomes=outcomes(scored),
        seconds=seconds,
    )
    return outcome, groups


def mode_settings(settings: RolloutSettings, mode: EvalMode, samples: int) -> RolloutSettings:
    """The rollout settings of a mode."""
    return settings.model_copy(update={"branching": mode == "parallel", "samples_per_prompt": samples})


def figures(outcome: Evaluation) -> dict[str, Any]:
    """The numbers that eval.json holds for one mode."""
    estimate = mean_with_interval(outcome.correct)
    samples = outcome.correct.shape[1]
    return {
        "problems": outcome.correct.shape[0],
        "samples_per_problem": samples,
        "accuracy": estimate.value,
        "accuracy_ci95": [estimate.low, estimate.high],
        f"best_at_{samples}": mean_pass_at_k(outcome.correct, samples),
        "format_valid": float(outcome.valid.mean()),
        "parallel_rate": float(outcome.parallel.mean()),
        "mean_total_tokens": float(outcome.num_tokens.mean()),
        "mean_critical_path": float(outcome.critical_path.mean()),
        "tokens_per_second": outcome.tokens_per_second,
        "finish_reasons": outcome.reasons,
        "outcomes": {name: share.count for name, share in outcome.outcomes.items()},
    }


def run(config: EvalConfig) -> None:
    """`npr eval`: every mode of eval.modes; writes eval.json and the rollouts of the first mode.

    Finished modes are kept in progress.jsonl: an interrupted evaluation continues with the others.
    """
    session = open_session(config)
    prompts = prompts_of_modes(session, config)
    engine = folder_engine(session, config.rollout)
    journal = Journal(config.run.dir / JOURNAL, session.world, continued=session.continued)
    finished: dict[str, Any] = {entry["mode"]: entry["figures"] for entry in journal.entries}
    left = [mode for mode in config.eval.modes if mode not in finished]
    first, total = len(finished), len(finished) + len(left)
    with (
        Verifier() as verifier,
        monitored(
            "eval", config.run, config.log, session.world, total=total, first=first, unit="modes"
        ) as monitor,
    ):
        for step, mode in enumerate(left, start=first):
            settings = mode_settings(config.rollout, mode, config.eval.samples_per_problem)
            identity = (config.run.seed, "eval", mode)
            outcome, groups = evaluate(session, engine, verifier, prompts[mode], settings, identity=identity)
            finished[mode] = figures(outcome)
            monitor.step(
                step,
                {"accuracy": float(outcome.correct.mean()), "format_valid": float(outcome.valid.mean())},
                tokens=int(outcome.num_tokens.sum()),
                shown=("accuracy", "format_valid"),
                shares=outcome.outcomes,
            )
            if session.world.is_main and step == 0:
                rollouts = [rollout for group in groups for rollout in group]
                write_rollouts(config.run.dir / "rollouts.jsonl", rollouts, session.vocabulary)
            journal.append({"mode": mode, "figures": finished[mode]})
    if session.world.is_main:
        modes = {mode: finished[mode] for mode in config.eval.modes}
        report = {"model": str(config.model.path), "seed": config.run.seed, "modes": modes}
        write_whole(config.run.dir / config.eval.out, json.dumps(report, indent=1) + "\n")
        print(json.dumps(modes, indent=1))


def prompts_of_modes(session: Session, config: EvalConfig) -> dict[EvalMode, tuple[EncodedProblem, ...]]:
    """The held-out problems as each mode asks for them; those of all modes are checked before the first."""
    found = {
        mode: evaluation_prompts(session, config.eval, "sequential" if mode == "sequential" else "parallel")
        for mode in config.eval.modes
    }
    every = [prompt for prompts in found.values() for prompt in prompts]
    check_rollout_room(session, every, config.eval, config.rollout)
    return found
