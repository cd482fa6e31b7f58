"""Rejection sampling (between stages 1 and 2): of up to `trials` responses a problem, keep the first right and valid one.

problems ─► rounds of one response for each problem still open ─► verifier + grammar ─► samples.jsonl
                                          └─► progress.jsonl: a line a round, from which the next start continues
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_npr.config import SampleConfig
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.data.rounds import Turn
from megatron_npr.data.samples import SftSample, write_samples
from megatron_npr.data.sft_encoding import canonical_ids
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.monitor import Monitor, monitored
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.collect import collect
from megatron_npr.rollout.scoring import Scored, agree_on_round, outcomes, score
from megatron_npr.run_folder.claim import JOURNAL
from megatron_npr.runtime.interrupt import stop_requests
from megatron_npr.stages.journal import Entry, Journal
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import Session, folder_engine, open_session
from npr_engine.backend import Backend

OUTCOMES = tuple(outcomes([]))
COUNTED = ("tokens", "tried", "valid", "correct", *OUTCOMES)


class Search:
    """Rejection sampling as far as it has come, which its rounds alone decide: trial by trial over the problems still open."""

    def __init__(self, prompts: Sequence[EncodedProblem], rounds: Sequence[Entry]) -> None:
        self.trial, self.open = 0, list(prompts)
        self.kept: dict[int, SftSample] = {}  # by the problem's row, in the order found
        self.counts: Counter[str] = Counter()  # of this trial
        for entry in rounds:
            self.take(entry)
            if self.trial_is_over:
                self.begin_trial()

    def next_round(self, size: int) -> list[EncodedProblem]:
        """The problems of the next round."""
        return self.open[self.counts["tried"] :][:size]

    def take(self, entry: Entry) -> None:
        """Count a round and keep its samples."""
        self.counts.update({name: entry[name] for name in COUNTED})
        self.kept |= {row: SftSample(**sample) for row, sample in entry["kept"]}

    @property
    def trial_is_over(self) -> bool:
        return self.counts["tried"] == len(self.open)

    def begin_trial(self) -> None:
        """The next one, for the problems of this one that are still open."""
        self.trial += 1
        self.open = [prompt for prompt in self.open if prompt.row not in self.kept]
        self.counts.clear()

    def report(self, monitor: Monitor) -> None:
        """The figures of this trial."""
        tried = self.counts["tried"]
        monitor.step(
            self.trial,
            {
                "kept": len(self.kept),
                "tried": tried,
                "format_valid": self.counts["valid"] / tried,
                "accuracy": self.counts["correct"] / tried,
            },
            tokens=self.counts["tokens"],
            shown=("kept",),
            shares={name: Share(self.counts[name], tried) for name in OUTCOMES}
            | {"invalid": Share(tried - self.counts["valid"], tried)},
        )


def run(config: SampleConfig) -> Path:
    """Sample, keep, write; returns the path of the samples. Ctrl-C ends after the round, with the samples found so far."""
    session = open_session(config)
    prompts = training_prompts(session, config.data)
    check_rollout_room(session, prompts, config.data, config.rollout)
    engine = folder_engine(session, config.rollout)
    journal = Journal(config.run.dir / JOURNAL, session.world, continued=session.continued)
    search, trials = Search(prompts, journal.entries), config.sample.trials
    target, stopped = config.sample.target or len(prompts), False

    def goes_on() -> bool:
        return bool(search.open) and search.trial < trials and len(search.kept) < target

    with (
        Verifier() as verifier,
        stop_requests() as stop,
        monitored(
            "sample", config.run, config.log, session.world, total=trials, first=search.trial, unit="trials"
        ) as monitor,
    ):
        while goes_on() and not stopped:
            entry = sample_round(session, engine, verifier, search, config)
            search.take(entry)
            if search.trial_is_over or not goes_on():
                search.report(monitor)
            journal.append(entry)
            if search.trial_is_over:
                search.begin_trial()
            stopped = stop.agreed()
    path = config.run.dir / config.sample.out
    if session.world.is_main:
        write_samples(path, list(search.kept.values())[:target])
    if stopped and goes_on():
        raise KeyboardInterrupt
    return path


def sample_round(
    session: Session, engine: Backend, verifier: Verifier, search: Search, config: SampleConfig
) -> Entry:
    """One response for each of the next problems: counts, and [row, sample] of those to keep."""
    chosen = search.next_round(config.rollout.prompts_per_step)
    settings = config.rollout.model_copy(update={"samples_per_prompt": 1})
    turns = [Turn(prompt, attempt=search.trial) for prompt in chosen]
    groups = collect(engine, session.world, turns, settings, identity=(config.run.seed, "sample"))
    scored = score(session.world, session.grammar, verifier, groups, turns, settings)
    agree_on_round(search.trial, turns, scored)
    kept = [(chosen[item.group], item) for item in scored if item.valid and item.correct]
    return {
        "tokens": sum(item.rollout.num_tokens for item in scored),
        "tried": len(scored),
        "valid": sum(item.valid for item in scored),
        "correct": sum(item.correct for item in scored),
        **{name: share.count for name, share in outcomes(scored).items()},
        "kept": [[prompt.row, asdict(accepted(session, prompt, item))] for prompt, item in kept],
    }


def accepted(session: Session, prompt: EncodedProblem, item: Scored) -> SftSample:
    """The response in canonical form: what the model wrote, tokenised piece by piece as the engine writes it."""
    response_ids = canonical_ids(item.rollout.token_ids, session.grammar)
    return SftSample(
        problem_id=prompt.problem.problem_id,
        prompt_ids=prompt.prompt_ids.tolist(),
        response_ids=[int(token) for token in response_ids],
        text=session.vocabulary.text([int(token) for token in response_ids]),
    )
