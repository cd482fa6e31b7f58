"""The phases of a demo run: each done once, timed, and remembered, so that an interrupted demo continues.

[3/6] stage 2: beta  (background: measure base 3/7)        when it begins
[3/6] stage 2: beta: 61 s  2:10 gone, about 4:30 left  when it has ended
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megatron_npr.monitoring.progress import duration
from megatron_npr.runtime.whole_file import write_whole

MEASURING = "measure"
"""Phases whose names begin so count as evaluation."""

POLL_SECONDS = 0.5


class Phases:
    """What one process of the demo does: its phases in order, each with its share of the work (any unit, the same for all
    processes), and when the finished ones began and ended (seconds since the epoch), in a file of the run folder.
    One process writes the file; others may read it."""

    def __init__(self, path: Path, shares: Mapping[str, float]) -> None:
        self._path = path
        self.shares = shares
        self.intervals: dict[str, tuple[float, float]] = {}
        self.read()

    def read(self) -> None:
        """Takes up what the process that writes the file has finished since."""
        if self._path.exists():
            found = json.loads(self._path.read_text())
            self.intervals = {name: (began, ended) for name, (began, ended) in found.items()}

    def run(self, name: str, work: Callable[[], object], outlook: Callable[[], str] = str) -> None:
        """Do the work unless a former run of this demo finished it; `outlook` is what to print behind the line."""
        title = f"{self.number(name)} {name}"
        if name in self.intervals:
            print(f"{title}: done before, {self.seconds[name]:.0f} s", flush=True)
            return
        print(f"{title}  {outlook()}".rstrip(), flush=True)
        began = time.time()
        work()
        self.intervals[name] = (began, time.time())
        write_whole(self._path, json.dumps(self.intervals))
        print(f"{title}: {self.seconds[name]:.0f} s  {outlook()}".rstrip(), flush=True)

    def number(self, name: str) -> str:
        """Which of how many: "[3/6]"."""
        return f"[{list(self.shares).index(name) + 1}/{len(self.shares)}]"

    def wait_for(self, name: str) -> None:
        """Until the process that writes the file has finished the phase `name`."""
        while name not in self.intervals:
            time.sleep(POLL_SECONDS)
            self.read()

    @property
    def current(self) -> str | None:
        """The first phase that has not ended; None when all have."""
        return next((name for name in self.shares if name not in self.intervals), None)

    @property
    def seconds(self) -> dict[str, float]:
        return {name: ended - began for name, (began, ended) in self.intervals.items()}

    @property
    def measuring(self) -> float:
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith(MEASURING))

    @property
    def seconds_left(self) -> float | None:
        """Seconds of the phases that have not ended, at the speed of those that have; None before the first has ended."""
        done = sum(self.shares[name] for name in self.intervals)
        if not done:
            return None
        return sum(self.seconds.values()) / done * (sum(self.shares.values()) - done)


def outlook(main: Phases, background: Phases) -> str:
    """What runs in the background, how long the demo has run, and about how long it still will."""
    background.read()
    name = background.current
    other = f"(background: {background.number(name)} {name})  " if name else ""
    gone = covered([*main.intervals.values(), *background.intervals.values()])
    left = [seconds for seconds in (main.seconds_left, background.seconds_left) if seconds is not None]
    return f"{other}{duration(gone)} gone, about {duration(max(left))} left" if left else other


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: the seconds in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(intervals):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
