"""Evaluation: accuracy, validity, genuine parallelism and speed of one model on held-out problems.

    prompts of a mode ─► rounds: engine (seeded by row and sample) ─► scores + execution trace ─► Evaluation ─► eval.json
                                     └─► progress.jsonl: a line a round, from which the next start continues

Modes: "parallel" (the engine forks and joins), "unforced" (the same prompt, decoded as one plain sequence: nothing is forced),
"sequential" (the sequential instruction, one plain sequence).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npr.config import EvalConfig, EvalMode, RolloutSettings
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.data.rounds import Turn
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import Monitor, monitored
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.collect import collect
from megatron_npr.rollout.rollout_file import append_rollouts, keep_rollouts
from megatron_npr.rollout.scoring import score
from megatron_npr.run_folder.claim import JOURNAL
from megatron_npr.runtime.interrupt import stop_requests
from megatron_npr.runtime.whole_file import write_whole
from megatron_npr.stages.evaluation import Evaluation
from megatron_npr.stages.journal import Entry, Journal
from megatron_npr.stages.prompt_sets import evaluation_prompts
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import Session, folder_engine, open_session
from npr_engine.backend import Backend
from npr_engine.rollout import Rollout
from npr_ext.errors import UserError

Prompts = Mapping[EvalMode, tuple[EncodedProblem, ...]]


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
    return Evaluation.of(scored, settings.samples_per_prompt, seconds), groups


def mode_settings(settings: RolloutSettings, mode: EvalMode, samples: int) -> RolloutSettings:
    """The rollout settings of a mode."""
    return settings.model_copy(update={"branching": mode == "parallel", "samples_per_prompt": samples})


@dataclass(frozen=True)
class Round:
    """Problems of one mode that are decoded together, from row `first` on."""

    mode: EvalMode
    first: int
    prompts: tuple[EncodedProblem, ...]


class Finished:
    """The rounds that are done, mode by mode."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        """From the entries of a journal; UserError where they are none of rounds."""
        if any("correct" not in entry for entry in entries):
            raise UserError(
                f"{path} holds whole modes, as an earlier version of npr eval kept them: start anew with --run.overwrite true"
            )
        self.rounds: dict[EvalMode, list[Evaluation]] = {}
        for entry in entries:
            self.take(entry["mode"], Evaluation.from_record(entry))

    def take(self, mode: EvalMode, evaluation: Evaluation) -> None:
        """Add a round."""
        self.rounds.setdefault(mode, []).append(evaluation)

    def num_problems(self, mode: EvalMode) -> int:
        """Problems that a mode has answered so far."""
        return sum(len(part.correct) for part in self.rounds.get(mode, ()))

    @property
    def num_rollouts(self) -> int:
        """Rollouts of the mode that came first, which are kept."""
        return sum(part.correct.size for part in next(iter(self.rounds.values()), ()))

    def left(self, prompts: Prompts, size: int) -> list[Round]:
        """What is still to do, in rounds of at most `size` problems."""
        return [
            Round(mode, first, chosen[first : first + size])
            for mode, chosen in prompts.items()
            for first in range(self.num_problems(mode), len(chosen), size)
        ]


def run(config: EvalConfig) -> None:
    """`npr eval`: every mode of eval.modes; writes eval.json and the rollouts of the first mode.

    Finished rounds are kept in progress.jsonl: Ctrl-C ends after the round, and the next start continues with the others.
    """
    session = open_session(config)
    prompts = prompts_of_modes(session, config)
    samples = config.eval.samples_per_problem
    settings = {mode: mode_settings(config.rollout, mode, samples) for mode in config.eval.modes}
    engine = folder_engine(session, settings.get("parallel", settings[config.eval.modes[0]]))
    journal = Journal(config.run.dir / JOURNAL, session.world, continued=session.continued)
    finished = Finished(config.run.dir / JOURNAL, journal.entries)
    kept, left = config.run.dir / "rollouts.jsonl", finished.left(prompts, config.rollout.prompts_per_step)
    if session.world.is_main:
        keep_rollouts(kept, finished.num_rollouts)
    first, stopped = len(journal.entries), False
    total = first + len(left)
    with (
        Verifier() as verifier,
        stop_requests() as stop,
        monitored(
            "eval", config.run, config.log, session.world, total=total, first=first, unit="rounds"
        ) as monitor,
    ):
        while left and not stopped:
            now = left.pop(0)
            identity = (config.run.seed, "eval", now.mode)
            outcome, groups = evaluate(
                session, engine, verifier, now.prompts, settings[now.mode], identity=identity
            )
            finished.take(now.mode, outcome)
            report(monitor, len(journal.entries), now.mode, outcome)
            if session.world.is_main and now.mode == next(iter(finished.rounds)):
                append_rollouts(kept, [rollout for group in groups for rollout in group], session.vocabulary)
            journal.append({"mode": now.mode, **outcome.to_record()})
            stopped = stop.agreed()
    if left:
        raise KeyboardInterrupt
    if session.world.is_main:
        write_figures(config, finished)


def report(monitor: Monitor, step: int, mode: EvalMode, outcome: Evaluation) -> None:
    """The figures of a round, under the name of its mode."""
    accuracy, valid = f"{mode}/accuracy", f"{mode}/format_valid"
    shares = dict(outcome.outcomes)
    if mode == "parallel":  # the others are not asked for blocks, or not made to write them
        shares["invalid"] = Share(int((~outcome.valid).sum()), outcome.valid.size)
    monitor.step(
        step,
        {accuracy: float(outcome.correct.mean()), valid: float(outcome.valid.mean())},
        tokens=int(outcome.num_tokens.sum()),
        shown=(accuracy, valid),
        shares={f"{mode}/{name}": share for name, share in shares.items()},
    )


def write_figures(config: EvalConfig, finished: Finished) -> None:
    """eval.json, and the same on the standard output."""
    modes: dict[str, Any] = {
        mode: Evaluation.joined(finished.rounds[mode]).figures() for mode in config.eval.modes
    }
    content = {"model": str(config.model.path), "seed": config.run.seed, "modes": modes}
    write_whole(config.run.dir / config.eval.out, json.dumps(content, indent=1) + "\n")
    print(json.dumps(modes, indent=1))


def prompts_of_modes(session: Session, config: EvalConfig) -> Prompts:
    """The held-out problems as each mode asks for them; those of all modes are checked before the first."""
    found = {
        mode: evaluation_prompts(session, config.eval, "sequential" if mode == "sequential" else "parallel")
        for mode in config.eval.modes
    }
    every = [prompt for prompts in found.values() for prompt in prompts]
    check_rollout_room(session, every, config.eval, config.rollout)
    return found
