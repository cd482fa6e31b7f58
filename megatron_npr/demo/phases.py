"""The phases of a demo run: each done once, timed, and remembered, so that an interrupted demo continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MEASURING = "measure"
"""Phases whose names begin so count as evaluation."""

POLL_SECONDS = 0.5


class Phases:
    """When each finished phase of one process began and ended (seconds since the epoch), in a file of the run folder.
    One process writes the file; others may read it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.intervals: dict[str, tuple[float, float]] = {}
        self.read()

    def read(self) -> None:
        """Takes up what the process that writes the file has finished since."""
        if self._path.exists():
            found = json.loads(self._path.read_text())
            self.intervals = {name: (began, ended) for name, (began, ended) in found.items()}

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Do the work unless a former run of this demo finished it."""
        if name in self.intervals:
            print(f"{name}: done before, {self.seconds[name]:.0f} s", flush=True)
            return
        began = time.time()
        work()
        self.intervals[name] = (began, time.time())
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(self.intervals))
        written.replace(self._path)
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

    def wait_for(self, name: str) -> None:
        """Until the process that writes the file has finished the phase `name`."""
        while name not in self.intervals:
            time.sleep(POLL_SECONDS)
            self.read()

    @property
    def seconds(self) -> dict[str, float]:
        return {name: ended - began for name, (began, ended) in self.intervals.items()}

    @property
    def measuring(self) -> float:
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith(MEASURING))


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: the seconds in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(intervals):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
