"""Stages on two ranks, where rank 1 does something else than rank 0: DATA FOLDER OUT (JSON: fault -> what the ranks said)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_npr.config import Stage1Config, Stage3Config, load_config
from megatron_npr.data.prompts import ASSETS
from megatron_npr.demo.base import FOLDER
from megatron_npr.rl.verifier import Verdict
from megatron_npr.rollout.scoring import Scored
from megatron_npr.stages import rl_stage, stage1, stage3
from megatron_npr.training import trainer
from npr_ext.errors import UserError
from tests.support.places import CONFIGS

DEMO = CONFIGS / "demo"
SECOND = os.environ["RANK"] == "1"

Function = Callable[..., Any]


@contextlib.contextmanager
def replaced(module: Any, name: str, make: Callable[[Function], Function]) -> Iterator[None]:
    """Another function under its name, for the length of a with-block, on the second rank alone."""
    original = getattr(module, name)
    if SECOND:
        setattr(module, name, make(original))
    try:
        yield
    finally:
        setattr(module, name, original)


def with_next_seed(original: Function) -> Function:
    return lambda prompts, count, step, seed: original(prompts, count, step, seed + 1)


def all_wrong(original: Function) -> Function:
    """As ranks judged that were in a hurry."""

    def score(*arguments: Any) -> list[Scored]:
        return [replace(item, verdict=Verdict.TIMED_OUT) for item in original(*arguments)]

    return score


def without_the_last(original: Function) -> Function:
    return lambda *arguments: original(*arguments)[:-1]


def backwards(original: Function) -> Function:
    return lambda *arguments, **options: original(*arguments, **options)[::-1]


FAULTS: dict[str, tuple[str, tuple[Any, str, Callable[[Function], Function]]]] = {
    "problems": ("stage3", (rl_stage, "round_turns", with_next_seed)),
    "verdicts": ("stage3", (rl_stage, "score", all_wrong)),
    "updates": ("stage1", (stage1, "split_updates", without_the_last)),
    "rows": ("stage1", (trainer, "plan_rows", backwards)),
}


def run(stage: str, folder: Path, data: str, *overrides: str) -> None:
    options = {
        "run.dir": folder,
        "run.threads": 1,
        "model.path": FOLDER,
        "data.train": data,
        "data.mode": "sequential",  # what the base model can do: right and wrong answers in one group
        "data.instruction": ASSETS / "instruction_sequential_demo.txt",
        "rollout.branching": "false",
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 2,
        "rollout.max_tokens": 8,
        "batch.micro_batch_tokens": 192,
        "optimizer.warmup_steps": 0,
        "train.steps": 1,
        "log.progress": "false",
    }
    if stage == "stage1":
        options |= {"dapo.dynamic_sampling": "false", "train.updates_per_step": 1}
        del options["rollout.branching"]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    module, schema = {"stage1": (stage1, Stage1Config), "stage3": (stage3, Stage3Config)}[stage]
    module.run(load_config(schema, DEMO / f"{stage}.toml", [*words, *overrides]))  # type: ignore[arg-type]


def said(work: Callable[[], None]) -> list[str | None]:
    """The UserError of each rank."""
    message: str | None = None
    try:
        work()
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


def main(arguments: Sequence[str]) -> None:
    data, folder, out = arguments[0], Path(arguments[1]), Path(arguments[2])
    report: dict[str, Any] = {}
    seed = ("--run.seed", "1") if SECOND else ()
    report["settings"] = said(lambda: run("stage3", folder / "settings", data, *seed))
    for name, (stage, fault) in FAULTS.items():
        with replaced(*fault):
            report[name] = said(partial(run, stage, folder / name, data))

    # Where the second rank stands, the file does not exist; and its verifier has no patience.
    here = Path.cwd()
    if SECOND:
        os.chdir(folder)
    relative = os.path.relpath(data, here)
    more = ("--rollout.max_tokens", "140", "--rollout.samples_per_prompt", "4")
    with replaced(rl_stage, "Verifier", lambda original: partial(original, timeout_seconds=0.0)):
        report["slow"] = said(partial(run, "stage3", folder / "slow", relative, *more))
    os.chdir(here)
    if not SECOND:
        out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
