"""Numbers of a run: metrics.jsonl always, tensorboard or wandb beside it.

    MetricsLog.log(step, loss=..., **{"rollout/valid": ...}) ──► a JSON object a line ──► read_metrics

A run that resumes at step s drops the lines of steps >= s first, so every step stands in the file once.
"""

import json
import math
import os
import tomllib
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from megatron_npr.runtime.json_lines import whole_lines
from megatron_npr.runtime.whole_file import write_whole

Number = int | float
Record = dict[str, Any]
METRICS = "metrics.jsonl"
CONFIG = "config.toml"
"""The resolved configuration, which the session writes."""

STEP_SECONDS = "step_seconds"
PHASE_SECONDS = "seconds/"
"""Metrics: wall time from the end of the step before to that of this one, and the part of it in each phase."""

WANDB_ID = "wandb_id"
"""The identity of this run at wandb: a run that is continued here is continued there."""

Backend = Literal["tensorboard", "wandb", "none"]


class Mirror(Protocol):
    """Where metrics go besides the file."""

    def log(self, step: int, values: dict[str, Number]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """The metrics of one run; silent on ranks that do not write."""

    def __init__(self, run_dir: Path, backend: Backend, is_writer: bool, first_step: int = 0) -> None:
        self.path = run_dir / METRICS
        self._is_writer = is_writer
        self._mirror: Mirror | None = None
        if not is_writer:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        _keep_steps_before(first_step, self.path)
        if backend == "tensorboard":
            self._mirror = _Tensorboard(run_dir / "tensorboard", first_step)
        elif backend == "wandb":
            self._mirror = _Wandb(run_dir)

    def log(self, step: int, **values: Number) -> None:
        """Append the numbers of one step; what is not finite becomes null in the file."""
        if not self._is_writer:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": step, **{name: finite.get(name) for name in values}})
        with self.path.open("a") as file:
            file.write(line + "\n")
        if self._mirror is not None:
            self._mirror.log(step, finite)

    def close(self) -> None:
        """Flush the mirror; the file is complete after every `log`."""
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl in file order; a last line cut off by a crash is left out."""
    return whole_lines(path)


def _keep_steps_before(first_step: int, path: Path) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] < first_step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


class _Tensorboard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the writer needs it

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: dict[str, Number]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path) -> None:
        import wandb  # slow to import, and only the writer needs it

        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project="npr",
            name=run_dir.name,
            dir=str(run_dir),
            mode=mode,
            id=_wandb_id(run_dir / WANDB_ID),
            resume="allow",
            config=_resolved_configuration(run_dir / CONFIG),
        )

    def log(self, step: int, values: dict[str, Number]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(path: Path) -> str:
    """The identity that the run folder keeps; a new one where it has none yet."""
    known = path.read_text().strip() if path.is_file() else ""
    if not known:
        known = uuid.uuid4().hex
        write_whole(path, known + "\n")
    return known


def _resolved_configuration(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
