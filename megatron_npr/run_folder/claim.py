"""The folder of a run: what it holds, who writes into it, and what a second start in it does.

    claim ──► no run there ──► run.json, config.toml ──► start
         └──► a run there ──► run.resume: continue it · run.overwrite: rename it to DIR.1, start · neither: refuse in one line

One process writes into a folder at a time: it holds a lock on `run.lock` for its life, so a start beside it is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_npr.config import StageConfig, to_toml
from megatron_npr.monitoring.metrics import CONFIG, METRICS, WANDB_ID, read_metrics
from megatron_npr.run_folder.manifest import candidates
from megatron_npr.run_folder.resumption import check_inputs, check_resumable, input_sums, settings_of
from megatron_npr.runtime.format_version import CURRENT, check_format
from megatron_npr.runtime.whole_file import write_whole
from npr_ext.errors import UserError

MARK = "run.json"
"""Format version, command, and the process that started last."""

LOCK = "run.lock"
CHECKPOINTS = "checkpoints"
JOURNAL = "progress.jsonl"
MODEL = "model"
STARTED = frozenset({MARK, CONFIG, LOCK, "tensorboard"})
"""What is there before the first step: nothing that a new start would lose."""

HELD = STARTED | {METRICS, CHECKPOINTS, JOURNAL, MODEL, "wandb", WANDB_ID}
WRITTEN = HELD | {"samples.jsonl", "eval.json", "rollouts.jsonl"}
TRAINING = frozenset({"stage1", "stage2", "stage3"})

FREE_TABLES = frozenset({"run", "log", "parallel"})
FREE_KEYS = frozenset(
    ("sample.trials", "sample.target", "sample.out", "eval.modes", "eval.out")
    + tuple(f"rollout.{key}" for key in ("prompts_per_step", "max_running_requests", "max_batch_tokens"))
    + tuple(f"rollout.{key}" for key in ("kv_slots", "block_size", "tp", "ep"))
)
"""Settings that may change where `npr sample` or `npr eval` continues: none decides what is sampled for a problem."""

_locks: dict[tuple[int, int], int] = {}
"""(device, inode) of the lock files that this process holds -> descriptor."""


def _close_locks() -> None:
    """In a forked child: the lock is its parent's, and ends with it."""
    for descriptor in _locks.values():
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


@dataclass(frozen=True)
class Mark:
    """What run.json says: the command, the process that started last (`job`: of Slurm, or None), and sums of what it read
    (see `resumption.input_sums`)."""

    command: str | None = None
    host: str = ""
    pid: int = 0
    job: str | None = None
    format_version: Any = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def ours(config: StageConfig) -> Mark:
        """The mark that this process leaves in a folder."""
        job = os.environ.get("SLURM_JOB_ID")
        sums = input_sums(settings_of(config))
        return Mark(config.command, socket.gethostname(), os.getpid(), job, CURRENT["run folder"], sums)

    @property
    def is_of_this_job(self) -> bool:
        """Whether Slurm started this very job again (requeued after a node's failure) after it had started the run."""
        requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        return requeued and self.job is not None and self.job == os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class FoundRun:
    """A run that stands in a folder. `done` counts steps of a checkpoint (training) or rounds (sample, eval)."""

    folder: Path
    mark: Mark
    names: frozenset[str] = field(repr=False)
    done: int | None
    last_step: int | None

    @property
    def has_work(self) -> bool:
        """False between a start and its first step."""
        return bool(self.names - STARTED)

    def __str__(self) -> str:
        unit = "round" if self.mark.command in ("sample", "eval") else "step"
        if self.done is not None:
            state = f"{unit} {self.done}"
            if unit == "step" and MODEL in self.names:
                state += ", its model is written"
        elif self.last_step is not None:
            state = f"step {self.last_step + 1}, without a checkpoint"
        else:
            state = "something to lose" if self.has_work else "no step yet"
        return f"{self.folder} holds a run of {self.mark.command or 'an unknown command'} ({state})"


def claim(config: StageConfig) -> bool:
    """Take the folder of a run for this process, as `run.resume` and `run.overwrite` say; True: continue what is there.

    Called by one rank. A run that was there is continued, left alone (UserError) or moved aside, never changed otherwise.
    """
    settings = config.run
    outputs = _outputs(config)
    found = find_run(settings.dir, outputs)
    if settings.resume is True and found is None:
        raise UserError(
            f"there is no run to resume in {settings.dir}: leave run.resume out, or set it to auto to start where there is none"
        )
    if found is not None and not settings.resume and not settings.overwrite:
        raise UserError(f"{found}: {_remedies(found)}")
    try:
        return _take(config, outputs)
    except OSError as error:
        raise UserError(f"cannot write to {settings.dir}: {error}") from None


def find_run(folder: Path, outputs: Iterable[str] = ()) -> FoundRun | None:
    """The run in a folder: anything that this program writes into one (`outputs`: files that the user has named)."""
    if not folder.is_dir():
        return None
    names = frozenset(path.name for path in folder.iterdir()) & (WRITTEN | set(outputs))
    if not names - {LOCK}:
        return None
    mark = _read_mark(folder)
    steps = [int(path.name.removeprefix("step_")) for path in candidates(folder / CHECKPOINTS)]
    done = steps[0] if steps else _num_lines(folder / JOURNAL) or None
    return FoundRun(folder, mark, names, done, _last_step(folder / METRICS))


def withdraw(folder: Path) -> None:
    """Take back what `claim` made where this process has done nothing in it: a failed start leaves no run behind."""
    lock = folder / LOCK
    if not lock.is_file() or _identity(lock.stat()) not in _locks:
        return
    if {path.name for path in folder.iterdir()} <= STARTED:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for name in (CONFIG, MARK, LOCK):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder that others see at this moment stays
            folder.rmdir()


def _take(config: StageConfig, outputs: frozenset[str]) -> bool:
    """`claim` behind the checks that need no lock."""
    settings = config.run
    _lock(settings.dir)
    found = find_run(settings.dir, outputs)  # again: now nobody else can change it
    continued = False
    if found is not None:
        if settings.resume or found.mark.is_of_this_job:
            continued = _continues(found, config)
        if not continued and found.has_work:
            _move_aside(found, config)
            _lock(settings.dir)
    write_whole(settings.dir / MARK, json.dumps(asdict(Mark.ours(config))) + "\n")
    write_whole(settings.dir / CONFIG, to_toml(config))
    return continued


def _continues(found: FoundRun, config: StageConfig) -> bool:
    """Whether there is something to continue; UserError where it is not this command's, or not with these settings."""
    check_format("run folder", found.folder, found.mark.format_version)
    if found.mark.command not in (None, config.command):
        raise UserError(f"{found}, not of {config.command}: choose another run.dir, or {_overwrite(found)}")
    if found.done is None:
        if config.run.resume is True:
            raise UserError(f"{found}: there is nothing to resume from; {_overwrite(found)}")
        return False
    if config.command in TRAINING:
        check_resumable(config, found.folder / CHECKPOINTS)
    else:
        _check_same_settings(found, config)
    return True


def _check_same_settings(found: FoundRun, config: StageConfig) -> None:
    """Samples of two configurations never mix."""
    before, now = _settings(found.folder / CONFIG), _flat(tomllib.loads(to_toml(config)))
    check_inputs(before, settings_of(config), found.mark.inputs, str(found))
    for name, value in now.items():
        free = (
            name in FREE_KEYS
            or name in found.mark.inputs
            or (name.partition(".")[0] in FREE_TABLES and name != "run.seed")
        )
        if not free and name in before and before[name] != value:
            raise UserError(
                f"{found} with {name} = {before[name]!r}, not {value!r}: give the old value, choose another run.dir, "
                f"or {_overwrite(found)}"
            )


def _move_aside(found: FoundRun, config: StageConfig) -> None:
    """Rename the folder (behind a link: the folder itself) to the first free of DIR.1, DIR.2, ..."""
    here = found.folder.resolve()
    if Path.cwd().is_relative_to(here):
        raise UserError(
            f"{found}, which is the current folder and cannot be moved aside: choose another run.dir"
        )
    for name, value in _flat(config.model_dump(mode="json")).items():
        table, key = name.split(".")
        if table != "run" and key != "out" and isinstance(value, str) and _lies_in(value, here):
            raise UserError(f"{found}, and {name} = {value} lies in it: choose another run.dir")
    target = _aside(found.folder)
    try:
        here.rename(target)
    except OSError as error:
        raise UserError(
            f"{found}, and it cannot be moved aside ({error.strerror}): choose another run.dir"
        ) from None
    print(f"npr: {found.folder}: the run that stood here is now in {target}", file=sys.stderr, flush=True)


def _aside(folder: Path) -> Path:
    here, number = folder.resolve(), 1
    while (target := here.with_name(f"{here.name}.{number}")).exists():
        number += 1
    return target


def _remedies(found: FoundRun) -> str:
    overwrite = f"start anew with --run.overwrite true, which moves it to {_aside(found.folder)}"
    return f"continue it with --run.resume true, or {overwrite}" if found.done is not None else overwrite


def _overwrite(found: FoundRun) -> str:
    return f"start anew with --run.overwrite true instead of run.resume, which moves it to {_aside(found.folder)}"


def _outputs(config: StageConfig) -> frozenset[str]:
    """First parts of the files that the configuration names in run.dir; UserError where one is not the user's to name."""
    parts = set()
    for table, values in config.model_dump(mode="json").items():
        if "out" not in values:
            continue
        out = Path(values["out"])
        if out.is_absolute() or ".." in out.parts or not out.parts:
            raise UserError(
                f"{table}.out = {out} is no name in run.dir: give a relative one, and run.dir = its folder"
            )
        if out.parts[0] in HELD | {"rollouts.jsonl"}:
            raise UserError(f"{table}.out = {out} is a name of the run folder's own: choose another")
        parts.add(out.parts[0])
    return frozenset(parts)


def _read_mark(folder: Path) -> Mark:
    """run.json, or for folders without one (and such that a crash left empty) the command that config.toml is of."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((folder / MARK).read_text())
        if isinstance(known, dict):
            return Mark(**{name: known[name] for name in Mark.__dataclass_fields__ if name in known})
    tables = {name.partition(".")[0] for name in _settings(folder / CONFIG)}
    commands = {"papo": "stage3", "dapo": "stage1", "sft": "stage2", "sample": "sample", "eval": "eval"}
    return Mark(next((command for table, command in commands.items() if table in tables), None))


def _settings(path: Path) -> dict[str, Any]:
    try:
        return _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, values in tables.items() for key, value in values.items()}


def _last_step(path: Path) -> int | None:
    try:
        records = read_metrics(path)
        return int(records[-1]["step"]) if records else None
    except (UserError, ValueError, KeyError, TypeError):
        return None


def _num_lines(path: Path) -> int:
    """Lines that are complete."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _lies_in(value: str, folder: Path) -> bool:
    return os.path.lexists(value) and Path(value).resolve().is_relative_to(folder)


def _lock(folder: Path) -> None:
    """Hold the folder's lock until this process ends; UserError where another process holds it."""
    folder.resolve().mkdir(parents=True, exist_ok=True)  # behind a link, whose folder may just have moved
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    identity = _identity(os.fstat(descriptor))
    try:
        if identity not in _locks:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks[identity] = descriptor
            return
    except BlockingIOError:
        os.close(descriptor)
        mark = _read_mark(folder)
        raise UserError(
            f"{folder} is in use: process {mark.pid} on {mark.host} writes into it; stop it, or choose another run.dir"
            f" (where that machine is gone for good: remove {folder / LOCK})"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(
            f"npr: {folder} lies on a file system without locks: start one run in it at a time",
            file=sys.stderr,
        )
    os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
