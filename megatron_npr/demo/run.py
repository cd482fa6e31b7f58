"""`make demo`: all three stages on the small base model, the controls, and the report; nothing but its own samples.

main        base ─► stage 1 (DAPO) ─► zero ─► sample ─► stage 2 (SFT of base) ─► beta ─► stage 3 (PAPO) ─► npr
background  └─► sequential RL (as many updates and samples as stages 1 and 3)       └─► more SFT (as many updates as stage 3)
every model is measured on the same held-out problems ─► report.html, report.json, the thresholds that are missed
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_npr.config import (
    CONFIGS,
    EvalConfig,
    EvalMode,
    SampleConfig,
    Section,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    load_config,
)
from megatron_npr.data.synthetic_tasks import demo_problems
from megatron_npr.demo import base, speed
from megatron_npr.demo.background import BackgroundProcess
from megatron_npr.demo.measure import Measured, measure
from megatron_npr.demo.phases import Phases, covered, outlook
from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.huggingface import load_tokenizer
from megatron_npr.monitoring.statistics import paired_difference
from megatron_npr.report import DemoResult, Speedup, Timeline, write_report
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.rollout_file import pieces, read_rollouts
from megatron_npr.rollout.scoring import answer_of
from megatron_npr.runtime.format_version import CURRENT, FORMAT_VERSION, check_format
from megatron_npr.runtime.latest import LATEST, latest, point_to
from megatron_npr.runtime.whole_file import write_whole
from megatron_npr.stages import rejection_sampling as sample
from megatron_npr.stages import stage1, stage2, stage3
from megatron_npr.stages.evaluate import mode_settings
from megatron_npr.stages.prompt_sets import HELDOUT_SEED, evaluation_prompts
from megatron_npr.training.session import folder_engine, open_session
from npr_engine.language.grammar import Grammar, Response
from npr_ext.errors import UserError

Config = TypeVar("Config", bound=Section)

NUM_TIMELINES = 4
SPEED_PROMPTS = {1: 8, 32: 64}
"""Problems decoded both ways at each batch size."""
SPEED_REPEATS = 3

MEASURED: dict[str, tuple[EvalMode, str]] = {
    "base": ("unforced", "base"),
    "base_sequential": ("sequential", "base"),
    "zero": ("unforced", "zero"),
    "beta": ("parallel", "beta"),
    "npr": ("parallel", "npr"),
    "sequential_rl": ("sequential", "sequential_rl"),
    "beta_more_sft": ("parallel", "beta_more_sft"),
}
"""Name in the report -> (way of decoding, model)."""
CONTROLS = ("beta_more_sft",)
ZERO, BETA, NPR = "stage 1: zero", "stage 2: beta", "stage 3: npr"
MAIN = "phases-main.json"
MAIN_SHARES = {ZERO: 30, "rejection sampling": 6, BETA: 12, NPR: 35, "measure npr": 9, "measure speed": 8}
BACKGROUND = "phases-background.json"
BACKGROUND_SHARES = {
    "control: sequential RL": 45,
    "measure base": 4,
    "measure base_sequential": 3,
    "measure sequential_rl": 3,
    "measure zero": 4,
    "measure beta": 5,
    "control: more SFT": 6,
    "measure beta_more_sft": 5,
}
"""Phases of the two processes in order, and their shares of the work; only the time left is told from them."""


def run(folder: Path, *, seed: int | None = None, resume: bool = False) -> list[str]:
    """Run (or continue) the demo below `folder`; returns the thresholds that were missed."""
    demo = Demo(run_folder(folder, seed, resume))
    demo.train_and_measure()
    write_report(demo.folder, demo.result(demo.folder))  # stays there when the next demo replaces the other
    missed = write_report(folder, demo.result(folder))
    print(f"report: {folder / 'report.html'}", flush=True)
    return missed


def run_folder(folder: Path, seed: int | None, resume: bool) -> Path:
    """A new folder of this run, or with `resume` the last one."""
    pointer, last = folder / LATEST, latest(folder)
    if resume:
        if last is None:
            raise UserError(f"nothing to resume in {folder}: start with `make demo`")
        if not (last / "demo.json").is_file():
            raise UserError(
                f"{pointer} names {last.name}, which is no demo: write another name into it, or start anew"
            )
        known = json.loads((last / "demo.json").read_text())
        check_format("demo folder", last, known.get(FORMAT_VERSION))
        started = known["seed"]
        if seed not in (None, started):
            raise UserError(
                f"the demo to resume has seed {started}, not {seed}: give SEED={started} or start anew"
            )
        return last
    seed = seed or 0
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}-{os.getpid()}"
    write_whole(
        folder / name / "demo.json", json.dumps({FORMAT_VERSION: CURRENT["demo folder"], "seed": seed}) + "\n"
    )
    if last is not None:
        print(f"the last demo stays in {last}; to continue it write {last.name} into {pointer}", flush=True)
    point_to(folder / name)
    return folder / name


class Demo:
    """One run of the demo: its folder, its configurations, its phases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = int(json.loads((folder / "demo.json").read_text())["seed"])
        self.main = Phases(folder / MAIN, MAIN_SHARES)
        self.background = Phases(folder / BACKGROUND, BACKGROUND_SHARES)
        self.cores = len(os.sched_getaffinity(0))
        self.threads = max(1, self.cores // 2)  # of each of the two processes

    def model(self, name: str) -> Path:
        """Folder of a model of this run."""
        return base.FOLDER if name == "base" else self.folder / name / "model"

    def config(self, cls: type[Config], file: str, name: str, *overrides: str) -> Config:
        """A file of configs/demo with this run's folder and seed."""
        own = ["--run.dir", str(self.folder / name), "--run.seed", str(self.seed), "--run.resume", "auto"]
        own += ["--run.threads", str(self.threads)]
        return load_config(cls, CONFIGS / "demo" / f"{file}.toml", [*own, *overrides])

    @property
    def zero(self) -> Stage1Config:
        return self.config(Stage1Config, "stage1", "zero", "--model.path", str(self.model("base")))

    @property
    def samples(self) -> SampleConfig:
        return self.config(SampleConfig, "sample", "samples", "--model.path", str(self.model("zero")))

    @property
    def beta(self) -> Stage2Config:
        return self._sft("beta", "base")

    @property
    def npr(self) -> Stage3Config:
        return self.config(Stage3Config, "stage3", "npr", "--model.path", str(self.model("beta")))

    @property
    def sequential_rl(self) -> Stage3Config:
        """As many updates and responses as stages 1 and 3 together."""
        zero, npr = self.zero, self.npr
        updates = zero.train.steps * zero.train.updates_per_step + npr.train.steps
        responses = sum(
            one.train.steps * one.rollout.prompts_per_step * one.rollout.samples_per_prompt
            for one in (zero, npr)
        )
        return self.config(
            Stage3Config,
            "sequential_rl",
            "sequential_rl",
            *("--model.path", str(self.model("base")), "--train.steps", str(updates)),
            *("--rollout.prompts_per_step", str(round(responses / updates / npr.rollout.samples_per_prompt))),
            *("--rollout.samples_per_prompt", str(npr.rollout.samples_per_prompt)),
        )

    @property
    def beta_more_sft(self) -> Stage2Config:
        """As many more steps as stage 3 has updates, at its learning rate: restarting SFT at its own peak would undo
        beta instead of continuing it."""
        train, optimizer = self.npr.train, self.npr.optimizer
        return self._sft(
            "beta_more_sft",
            "beta",
            *("--train.steps", str(train.steps)),
            *("--optimizer.lr", str(optimizer.lr), "--optimizer.min_lr", str(optimizer.min_lr)),
        )

    def _sft(self, name: str, start: str, *overrides: str) -> Stage2Config:
        samples = str(self.folder / "samples" / self.samples.sample.out)
        paths = ("--model.path", str(self.model(start)), "--sft.data", samples)
        return self.config(Stage2Config, "stage2", name, *paths, *overrides)

    def train_and_measure(self) -> None:
        """Every phase that is not done yet: the main ones here, the others in the background, the speed at the end."""
        print(
            f"controls and measurements run in the background, their log is {self.folder / 'background.log'}",
            flush=True,
        )
        with (
            BackgroundProcess(self.folder, self.background, threads=self.threads) as background,
            Verifier() as verifier,
        ):
            for phase, work in (
                (ZERO, lambda: stage1.run(self.zero)),
                ("rejection sampling", lambda: sample.run(self.samples)),
                (BETA, lambda: stage2.run(self.beta)),
                (NPR, lambda: stage3.run(self.npr)),
                ("measure npr", lambda: self.measure("npr", verifier)),
            ):
                self.run_phase(phase, work)
                background.tell()
            print("the main phases are done; waiting for the background", flush=True)
            background.finish()
        self.run_phase("measure speed", self.measure_speed)

    def run_phase(self, name: str, work: Callable[[], object]) -> None:
        """A phase of the main process, with what the console says before and after it."""
        self.main.run(name, work, lambda: outlook(self.main, self.background))

    def run_background(self) -> None:
        """What the main process does not wait for: controls, and measurements of what it has made."""
        with Verifier() as verifier:

            def measure(name: str) -> None:
                self.background.run(f"measure {name}", lambda: self.measure(name, verifier))

            self.background.run("control: sequential RL", lambda: stage3.run(self.sequential_rl))
            for name in ("base", "base_sequential", "sequential_rl"):
                measure(name)
            self.main.wait_for(ZERO)
            measure("zero")
            self.main.wait_for(BETA)
            measure("beta")
            self.background.run("control: more SFT", lambda: stage2.run(self.beta_more_sft))
            measure("beta_more_sft")

    def measure(self, name: str, verifier: Verifier) -> None:
        """Measure one model in its way of decoding."""
        mode, model = MEASURED[name]
        measure(self.evaluation(name, model), mode, self.folder / "measured", name, verifier)

    def evaluation(self, name: str, model: str, *overrides: str) -> EvalConfig:
        """The evaluation's configuration for one model."""
        folder = f"measured/{name}"
        return self.config(EvalConfig, "eval", folder, "--model.path", str(self.model(model)), *overrides)

    def measured(self, name: str) -> Measured:
        """What was measured of one model."""
        return Measured(self.folder / "measured" / f"{name}.npz")

    def measure_speed(self) -> None:
        """npr's weights on all cores, with and without branches, at batch 1 and 32."""
        config = self.evaluation("speed", "npr", "--run.threads", str(self.cores))
        session = open_session(config)
        engine = folder_engine(session, config.rollout)
        prompts = evaluation_prompts(session, config.eval, "parallel")
        settings = mode_settings(config.rollout, "parallel", 1)
        measured = {
            f"batch_{batch}": vars(
                speed.measure(
                    engine, prompts[:count], settings, batch=batch, repeats=SPEED_REPEATS, seed=self.seed
                )
            )
            for batch, count in SPEED_PROMPTS.items()
        }
        (self.folder / "measured" / "speed.json").write_text(json.dumps(measured, indent=1))

    def result(self, report_folder: Path) -> DemoResult:
        """What the report shows."""
        self.background.read()
        measured = {name: self.measured(name) for name in MEASURED}
        figures = {name: one.figures() for name, one in measured.items()}
        correct = {name: one.array("sampled", "correct") for name, one in measured.items()}
        pairs = [
            ("npr", "beta"),
            ("npr", "base"),
            ("npr", "base_sequential"),
            ("npr", "sequential_rl"),
            ("npr", "zero"),
        ]
        pairs += [("beta_more_sft", "beta"), ("npr", "beta_more_sft")]
        problems, samples = correct["npr"].shape
        return DemoResult(
            seed=self.seed,
            wall_seconds=covered([*self.main.intervals.values(), *self.background.intervals.values()]),
            evaluation_seconds=self.main.measuring + self.background.measuring,
            num_problems=problems,
            samples_per_problem=samples,
            stages={name: value for name, value in figures.items() if name not in CONTROLS},
            controls={name: figures[name] for name in CONTROLS},
            comparisons={f"{a} - {b}": paired_difference(correct[a], correct[b]) for a, b in pairs},
            speedup=self.speedup(),
            phase_seconds={"main": self.main.seconds, "background": self.background.seconds},
            curves={
                title: Path(os.path.relpath(self.folder / name / "metrics.jsonl", report_folder))
                for title, name in {
                    "Stage 1: DAPO": "zero",
                    "Stage 2: parallel SFT": "beta",
                    "Stage 3: PAPO": "npr",
                    "Control: sequential RL": "sequential_rl",
                }.items()
            },
            timelines=self.timelines(),
        )

    def speedup(self) -> Speedup:
        """The two batch sizes; the ideal is that of the larger set of responses."""
        measured = json.loads((self.folder / "measured" / "speed.json").read_text())
        return Speedup(
            batch_1=measured["batch_1"]["wall"],
            batch_32=measured["batch_32"]["wall"],
            steps_1=measured["batch_1"]["steps"],
            steps_32=measured["batch_32"]["steps"],
            ideal=measured["batch_32"]["ideal"],
            median_step_tokens=self.median_step_tokens(),
        )

    def median_step_tokens(self) -> float:
        """Median length of a step's text over npr's valid responses."""
        grammar = self.grammar()
        lengths = []
        for rollout in read_rollouts(self.folder / "measured" / "npr.jsonl"):
            tree = grammar.parse(rollout.token_ids)
            if isinstance(tree, Response):
                lengths += [len(step) for block in tree.blocks for step in block.steps]
        return float(np.median(lengths)) if lengths else float("nan")

    def grammar(self) -> Grammar:
        """The demo's language."""
        return Grammar(read_vocabulary(base.FOLDER, load_tokenizer(base.FOLDER)))

    def timelines(self) -> tuple[Timeline, ...]:
        """The first held-out problems with npr's first response to each."""
        grammar = self.grammar()
        rollouts = read_rollouts(self.folder / "measured" / "npr.jsonl")[:NUM_TIMELINES]
        problems = demo_problems("heldout", len(rollouts), HELDOUT_SEED)
        return tuple(
            Timeline(
                question=problem.question,
                gold=problem.answer,
                correct=answer_of(grammar, rollout) == problem.answer,
                rollout=rollout,
                pieces=pieces(rollout, grammar.vocabulary),
            )
            for problem, rollout in zip(problems, rollouts, strict=True)
        )
