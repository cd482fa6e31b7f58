"""The phases of a demo run: each done once, timed, and remembered, so that an interrupted demo continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

MEASURING = "measure"
"""Phases whose names begin so count as evaluation."""


class Phases:
    """Seconds of each finished phase, kept in a file of the run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Do the work unless a former run of this demo finished it."""
        if name in self.seconds:
            print(f"{name}: done before, {self.seconds[name]:.0f} s", flush=True)
            return
        began = time.perf_counter()
        work()
        self.seconds[name] = time.perf_counter() - began
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(self.seconds))
        written.replace(self._path)
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def measuring(self) -> float:
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith(MEASURING))
