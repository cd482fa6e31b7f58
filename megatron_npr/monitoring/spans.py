"""Phases of a step: `with span("rollout"):` writes a JSON line, and an NVTX range where there is CUDA.

Times are those of the host: a phase that ends with queued device work has to synchronise by itself.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Span:
    """One measured phase; `seconds` is known when its with-block has ended."""

    name: str
    depth: int
    start: float
    seconds: float = 0.0


@dataclass
class SpanLog:
    """Where the spans of a with-block of `record_spans` go."""

    path: Path
    clock: Callable[[], float] = time.perf_counter
    depth: int = 0
    spans: list[Span] = field(default_factory=list)

    def totals(self) -> dict[str, float]:
        """Seconds by name over everything recorded so far."""
        total: dict[str, float] = {}
        for finished in self.spans:
            total[finished.name] = total.get(finished.name, 0.0) + finished.seconds
        return total


_ACTIVE: ContextVar[SpanLog | None] = ContextVar("span_log", default=None)


@contextlib.contextmanager
def record_spans(path: Path, clock: Callable[[], float] = time.perf_counter) -> Iterator[SpanLog]:
    """Append the spans that end inside this with-block to `path` (JSON lines, in order of their ends)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = SpanLog(path, clock)
    token = _ACTIVE.set(log)
    try:
        yield log
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def span(name: str) -> Iterator[Span]:
    """Measure a phase. Outside `record_spans` it only times itself."""
    log = _ACTIVE.get()
    clock = log.clock if log is not None else time.perf_counter
    current = Span(name, log.depth if log is not None else 0, clock())
    if log is not None:
        log.depth += 1
    nvtx = torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        yield current
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
        current.seconds = clock() - current.start
        if log is not None:
            log.depth -= 1
            log.spans.append(current)
            with log.path.open("a") as file:
                file.write(json.dumps(vars(current)) + "\n")
