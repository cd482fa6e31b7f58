"""What the demo measured, as its report shows it and as report.json says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_npr.monitoring.statistics import PairedDifference
from megatron_npr.rollout.rollout_file import from_record, to_record
from megatron_npr.runtime.format_version import CURRENT, FORMAT_VERSION, check_format
from megatron_npr.runtime.whole_file import write_whole
from npr_engine.rollout import Rollout

TOP_P_KEY = "accuracy_top_p_0.7"
STAGES = ("base", "base_sequential", "zero", "beta", "npr", "sequential_rl")
TITLES = {
    "base": "Base, parallel format",
    "base_sequential": "Base, sequential",
    "zero": "Zero (stage 1, DAPO)",
    "beta": "Beta (stage 2, parallel SFT)",
    "npr": "NPR (stage 3, PAPO)",
    "sequential_rl": "Control: sequential RL",
    "beta_more_sft": "Control: Beta with more SFT",
}


@dataclass(frozen=True)
class StageFigures:
    """One model in one way of decoding, over all held-out problems and samples at T = 1 unless the name differs."""

    accuracy: float
    accuracy_ci95: tuple[float, float]
    accuracy_greedy: float
    accuracy_top_p: float  # top_p = 0.7
    format_valid: float
    format_valid_unforced: float
    parallel_rate: float
    mean_total_tokens: float
    mean_critical_path: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        record = dict(vars(self))
        record[TOP_P_KEY] = record.pop("accuracy_top_p")
        return {**record, "accuracy_ci95": list(self.accuracy_ci95)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> StageFigures:
        known = dict(record)
        low, high = known.pop("accuracy_ci95")
        return StageFigures(accuracy_top_p=known.pop(TOP_P_KEY), accuracy_ci95=(low, high), **known)


@dataclass(frozen=True)
class Speedup:
    """Wall time of sequential decoding over parallel decoding of equally long responses, same weights, one run.

    `ideal` is total / critical-path tokens of those responses, `steps_1` and `steps_32` how many times fewer engine steps
    branches need (from the trace: no clock is in it), `median_step_tokens` the median length of a `<step>`.
    """

    batch_1: float
    batch_32: float
    steps_1: float
    steps_32: float
    ideal: float
    median_step_tokens: float


@dataclass(frozen=True)
class Timeline:
    """A real rollout to be drawn: `pieces` is the text of every response token, [R]."""

    question: str
    gold: str
    correct: bool
    rollout: Rollout
    pieces: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rollout": to_record(self.rollout), "pieces": list(self.pieces)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Timeline:
        known = {**record, "rollout": from_record(record["rollout"]), "pieces": tuple(record["pieces"])}
        return Timeline(**known)


@dataclass(frozen=True)
class DemoResult:
    """Everything the report shows.

    Attributes:
        stages: by the names of STAGES.
        controls: beside the stages, e.g. "beta_more_sft".
        comparisons: paired over the same problems, e.g. {"npr - beta": ..., "npr - base": ...}; the first is required.
        wall_seconds: in which at least one phase ran.
        phase_seconds: of each process, by phase, in order; `evaluation_seconds` is what measuring has of them.
        curves: metrics.jsonl of every training run by title, relative to the report's folder.
    """

    seed: int
    wall_seconds: float
    evaluation_seconds: float
    num_problems: int
    samples_per_problem: int
    stages: Mapping[str, StageFigures]
    controls: Mapping[str, StageFigures]
    comparisons: Mapping[str, PairedDifference]
    speedup: Speedup
    phase_seconds: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Path] = field(default_factory=dict)
    timelines: tuple[Timeline, ...] = ()

    @property
    def busy_seconds(self) -> float:
        """Seconds that the phases of all processes took together."""
        return sum(sum(phases.values()) for phases in self.phase_seconds.values())

    def to_report(self) -> dict[str, Any]:
        """report.json: the keys that the thresholds are checked against, and `details`."""
        main = self.comparisons["npr - beta"]
        speedup = self.speedup
        return {
            "wall_seconds": self.wall_seconds,
            "seed": self.seed,
            "stages": {name: figures.to_json() for name, figures in self.stages.items()},
            "npr_minus_beta": _comparison(main),
            "speedup_wall": {
                "batch_1": speedup.batch_1,
                "batch_32": speedup.batch_32,
                "ideal": speedup.ideal,
            },
            "fewer_steps": {"batch_1": speedup.steps_1, "batch_32": speedup.steps_32},
            "controls": {name: figures.to_json() for name, figures in self.controls.items()},
            "details": {
                "num_problems": self.num_problems,
                "samples_per_problem": self.samples_per_problem,
                "evaluation_seconds": self.evaluation_seconds,
                "busy_seconds": self.busy_seconds,
                "median_step_tokens": speedup.median_step_tokens,
                "phase_seconds": {name: dict(phases) for name, phases in self.phase_seconds.items()},
                "comparisons": {name: _comparison(value) for name, value in self.comparisons.items()},
            },
        }

    def save(self, path: Path) -> None:
        """Everything, so that `npr report` can draw the page again."""
        record = {
            FORMAT_VERSION: CURRENT["report record"],
            "report": self.to_report(),
            "curves": {title: str(curve) for title, curve in self.curves.items()},
            "timelines": [timeline.to_json() for timeline in self.timelines],
        }
        write_whole(path, json.dumps(record))

    @staticmethod
    def load(path: Path) -> DemoResult:
        """The inverse of `save`."""
        record = json.loads(path.read_text())
        check_format("report record", path, record.get(FORMAT_VERSION))
        report = record["report"]
        details = report["details"]
        return DemoResult(
            seed=report["seed"],
            wall_seconds=report["wall_seconds"],
            evaluation_seconds=details["evaluation_seconds"],
            num_problems=details["num_problems"],
            samples_per_problem=details["samples_per_problem"],
            stages={name: StageFigures.from_json(value) for name, value in report["stages"].items()},
            controls={name: StageFigures.from_json(value) for name, value in report["controls"].items()},
            comparisons={
                name: PairedDifference(value["delta"], value["ci95"][0], value["ci95"][1], value["p_value"])
                for name, value in details["comparisons"].items()
            },
            speedup=Speedup(
                **report["speedup_wall"],
                steps_1=report["fewer_steps"]["batch_1"],
                steps_32=report["fewer_steps"]["batch_32"],
                median_step_tokens=details["median_step_tokens"],
            ),
            phase_seconds=details["phase_seconds"],
            curves={title: Path(curve) for title, curve in record["curves"].items()},
            timelines=tuple(Timeline.from_json(timeline) for timeline in record["timelines"]),
        )


def _comparison(value: PairedDifference) -> dict[str, Any]:
    return {"delta": value.delta, "ci95": [value.low, value.high], "p_value": value.p_value}
