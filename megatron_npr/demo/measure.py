"""Everything the demo measures of one model, kept as a file: outcomes at T = 1, greedy, top_p 0.7, and unforced.

model folder ─► engine ─► Evaluation for each way of decoding ─► NAME.npz ─► StageFigures
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npr.config import EvalConfig, EvalMode, RolloutSettings
from megatron_npr.monitoring.progress import Progress
from megatron_npr.monitoring.statistics import mean_with_interval
from megatron_npr.report import StageFigures
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.rollout_file import write_rollouts
from megatron_npr.stages.evaluate import evaluate, mode_settings
from megatron_npr.stages.evaluation import Evaluation
from megatron_npr.stages.prompt_sets import evaluation_prompts
from megatron_npr.training.session import folder_engine, open_session

WAYS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.0, "top_p": 1.0},
    "greedy": {"temperature": 0.0, "top_p": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
}
SAMPLES = {"greedy": 1, "top_p": 1}
"""Samples a problem where it is not the configuration's number."""


def measure(config: EvalConfig, mode: EvalMode, folder: Path, name: str, verifier: Verifier) -> None:
    """Decode the held-out problems with one model in every way; writes NAME.npz and NAME.jsonl (rollouts of T = 1)."""
    session = open_session(config)
    engine = folder_engine(session, config.rollout)
    outcomes: dict[str, Evaluation] = {}
    prompts = evaluation_prompts(session, config.eval, "sequential" if mode == "sequential" else "parallel")
    ways = planned(config, mode)
    shown = session.world.is_main and config.log.progress
    with Progress(f"measure {name}", len(ways), "ways of decoding", shown=shown) as progress:
        for way, settings in ways.items():
            identity = (config.run.seed, "measure", way)
            outcomes[way], groups = evaluate(session, engine, verifier, prompts, settings, identity=identity)
            if way == "sampled" and session.world.is_main:
                write_rollouts(folder / f"{name}.jsonl", [group[0] for group in groups], session.vocabulary)
            progress.advance(tokens=int(outcomes[way].num_tokens.sum()))
    if session.world.is_main:
        save(folder / f"{name}.npz", outcomes)


def planned(config: EvalConfig, mode: EvalMode) -> dict[str, RolloutSettings]:
    """The ways of decoding a model; one that branches in the engine is decoded with nothing forced, too."""
    ways = {
        way: mode_settings(
            config.rollout.model_copy(update=changes), mode, SAMPLES.get(way, config.eval.samples_per_problem)
        )
        for way, changes in WAYS.items()
    }
    if mode == "parallel":
        ways["unforced"] = mode_settings(ways["sampled"], "unforced", 1)
    return ways


def save(path: Path, outcomes: dict[str, Evaluation]) -> None:
    """All arrays of all ways in one file."""
    arrays = {
        f"{way}/{field.name}": np.asarray(getattr(outcome, field.name))
        for way, outcome in outcomes.items()
        for field in fields(Evaluation)
        if field.name not in ("reasons", "outcomes")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


class Measured:
    """What `measure` wrote of one model."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)

    def array(self, way: str, name: str) -> np.ndarray[Any, Any]:
        """One array of one way of decoding, e.g. ("sampled", "correct"): [P, S]."""
        array: np.ndarray[Any, Any] = self._arrays[f"{way}/{name}"]
        return array

    def figures(self) -> StageFigures:
        """The figures of report.json."""
        accuracy = mean_with_interval(self.array("sampled", "correct"))
        unforced = "unforced" if "unforced/valid" in self._arrays else "sampled"
        tokens = self.array("sampled", "num_tokens")
        return StageFigures(
            accuracy=accuracy.value,
            accuracy_ci95=(accuracy.low, accuracy.high),
            accuracy_greedy=float(self.array("greedy", "correct").mean()),
            accuracy_top_p=float(self.array("top_p", "correct").mean()),
            format_valid=float(self.array("sampled", "valid").mean()),
            format_valid_unforced=float(self.array(unforced, "valid").mean()),
            parallel_rate=float(self.array("sampled", "parallel").mean()),
            mean_total_tokens=float(tokens.mean()),
            mean_critical_path=float(self.array("sampled", "critical_path").mean()),
            tokens_per_second=float(tokens.sum() / self.array("sampled", "seconds")),
        )
