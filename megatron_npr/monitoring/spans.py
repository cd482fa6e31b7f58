"""Phases of a step: where its time goes.

    with span("rollout"): ... ──► an NVTX range where there is CUDA, and seconds by phase ──► PhaseTimes.take() ──► metrics

A phase's seconds are its own: those of a phase inside it are the inner one's, so phases sum to at most the whole. Times are
those of the host; a phase of a stage ends with a number that the host reads, so it has the device work that it queued.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch


class PhaseTimes:
    """Seconds by phase of the spans that end on this thread within a with-block of `timed_phases`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds of the spans that have ended inside the one that is open
        self._since = clock()

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call (or the start), and those of them in each phase, in the order of their first ends."""
        now = self.clock()
        whole, phases = now - self._since, dict(self._seconds)
        self._seconds.clear()
        self._since = now
        return whole, phases

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count a with-block, without the phases inside it."""
        outer, self._inner = self._inner, 0.0
        began = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - began
            self._seconds[name] += seconds - self._inner
            self._inner = outer + seconds


_ACTIVE: ContextVar[PhaseTimes | None] = ContextVar("phase_times", default=None)


@contextlib.contextmanager
def timed_phases(times: PhaseTimes) -> Iterator[PhaseTimes]:
    """Within this with-block spans count in `times`."""
    token = _ACTIVE.set(times)
    try:
        yield times
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Mark a phase, as a with-block or a decorator; outside `timed_phases` for Nsight alone."""
    times = _ACTIVE.get()
    with _nvtx_range(name), contextlib.nullcontext() if times is None else times.phase(name):
        yield


@contextlib.contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
