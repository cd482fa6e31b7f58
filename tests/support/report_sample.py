"""A made-up demo result with a hand-made rollout, for the report's tests alone."""

from pathlib import Path

import numpy as np

from megatron_npr.monitoring.metrics import MetricsLog
from megatron_npr.monitoring.statistics import PairedDifference
from megatron_npr.report import DemoResult, Speedup, StageFigures, Timeline
from npr_engine.rollout import Rollout

STEPS = ("12*4=48", "9*7=63", "6*5=30")


def stage(accuracy: float, valid: float, parallel: float) -> StageFigures:
    return StageFigures(
        accuracy=accuracy,
        accuracy_ci95=(accuracy - 0.02, accuracy + 0.02),
        accuracy_greedy=accuracy + 0.05,
        accuracy_top_p=accuracy + 0.03,
        format_valid=valid,
        format_valid_unforced=valid - 0.01,
        parallel_rate=parallel,
        mean_total_tokens=96.5,
        mean_critical_path=52.25,
        tokens_per_second=4321.0,
    )


def rollout() -> tuple[Rollout, tuple[str, ...]]:
    """One block of three branches: the trunk decodes a token a step, the branches side by side."""
    rows: list[tuple[str, int, int, int, bool]] = []  # piece, branch, step, position, forced

    def trunk(text: list[str], step: int, position: int, forced: bool = False) -> tuple[int, int]:
        for offset, piece in enumerate(text):
            rows.append((piece, 0, step + offset, position + offset, forced))
        return step + len(text), position + len(text)

    plans = [piece for number in (1, 2, 3) for piece in ("<plan>", *f"{number}: part", "</plan>")]
    fork, at = trunk(["<guideline>", *plans, "</guideline>"], 0, 10)
    for branch, text in enumerate(STEPS, start=1):
        opening = ["\n", "<step>", "\n", str(branch), ":"]
        rows.extend((piece, branch, fork, at + index, True) for index, piece in enumerate(opening))
        body = [*text, "\n", "</step>"]
        rows.extend(
            (piece, branch, fork + 1 + index, at + 5 + index, False) for index, piece in enumerate(body)
        )
    longest = max(len(text) for text in STEPS)
    join, at = fork + longest + 3, at + longest + 7
    rows.extend((piece, 0, join, at + index, True) for index, piece in enumerate(("\n", "<takeaway>", "\n")))
    trunk([*"30<48<63", "\n", "</takeaway>", *"\\boxed{30,48,63}", "<eos>"], join + 1, at + 3)
    num = len(rows)
    forced = np.array([row[4] for row in rows])
    logprobs = np.where(forced, np.nan, -0.1).astype(np.float32)
    made = Rollout(
        request_id="p0/0",
        prompt_ids=np.arange(10, dtype=np.int32),
        token_ids=np.arange(num, dtype=np.int32),
        logprobs=logprobs,
        sampler_logprobs=logprobs,
        forced=forced,
        branch_ids=np.array([row[1] for row in rows], np.int32),
        decode_steps=np.array([row[2] for row in rows], np.int32) + 40,
        positions=np.array([row[3] for row in rows], np.int32),
        finish_reason="eos",
        branching=True,
        constrained=False,
        weights_version=7,
    )
    return made, tuple(row[0] for row in rows)


def result(folder: Path) -> DemoResult:
    for name in ("stage1", "stage3"):
        rng = np.random.default_rng(len(name))
        with MetricsLog(folder / name, "none", True) as log:
            for step in range(40):
                rise = 1 - 0.6 * np.exp(-step / 10)
                log.log(
                    step,
                    accuracy=rise - 0.1 * rng.random(),
                    loss=2 - rise + 0.1 * rng.random(),
                    dropped=step % 5,
                )
    made, pieces = rollout()
    return DemoResult(
        seed=7,
        wall_seconds=600.0,
        evaluation_seconds=150.0,
        num_problems=512,
        samples_per_problem=4,
        stages={
            "base": stage(0.20, 0.35, 0.30),
            "base_sequential": stage(0.42, 0.0, 0.0),
            "zero": stage(0.50, 0.95, 0.0),
            "beta": stage(0.78, 0.99, 0.98),
            "npr": stage(0.86, 0.995, 0.995),
            "sequential_rl": stage(0.60, 0.0, 0.0),
        },
        controls={"beta_more_sft": stage(0.79, 0.99, 0.99)},
        comparisons={
            "npr - beta": PairedDifference(0.08, 0.06, 0.10, 0.0001),
            "npr - sequential_rl": PairedDifference(0.26, 0.23, 0.29, 0.0001),
        },
        speedup=Speedup(
            batch_1=1.8, batch_32=1.75, steps_1=1.88, steps_32=2.1, ideal=1.9, median_step_tokens=17
        ),
        phase_seconds={
            "main": {"stage 1": 150.0, "sample": 40.0, "stage 2": 80.0, "stage 3": 180.0},
            "background": {"measure npr": 150.0},
        },
        curves={"Stage 1, DAPO": Path("stage1/metrics.jsonl"), "Stage 3, PAPO": Path("stage3/metrics.jsonl")},
        timelines=(Timeline("Sort: 12*4; 9*7; 6*5", "30,48,63", True, made, pieces),) * 2,
    )
