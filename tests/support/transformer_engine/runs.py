"""What a worker with Transformer Engine is asked for and what it answers: plain records, for worker and test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.fakes import te_on_cpu
from tests.support.launch import run_worker


@dataclass(frozen=True)
class Run:
    """A trainer of a model, and what is measured with it: `measure` is a function of the worker."""

    model: str
    measure: str = "train"
    fp8: dict[str, Any] | None = None
    """The table [fp8]; None: fp32."""
    recompute: str = "none"
    parallel: dict[str, Any] = field(default_factory=dict)
    own_layers: bool = False
    """Megatron's and our own linear layers instead of Transformer Engine's."""
    updates: int = 3
    save: str | None = None
    """Folder for a checkpoint after the first update."""
    resume: str | None = None
    """Folder with a checkpoint to begin from."""


@dataclass(frozen=True)
class Figures:
    """What a run gives: each update's loss and gradient norm, how many tensors each kind of quantiser rounded, and what the
    measurement found besides on each rank."""

    losses: list[float]
    norms: list[float]
    rounded: dict[str, int]
    found: list[dict[str, Any]]


def measure(runs: Mapping[str, Run], processes: int) -> dict[str, Figures]:
    """One world of processes that takes the runs in their order."""
    asked = json.dumps({name: asdict(run) for name, run in runs.items()})
    answered = json.loads(run_worker("te", (asked,), processes, through=te_on_cpu.__name__))
    return {name: Figures(**figures) for name, figures in answered.items()}
