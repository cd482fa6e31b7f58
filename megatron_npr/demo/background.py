"""The demo's background process: controls and measurements, which the main process does not wait for.

Two processes on half of the cores each get a third more done than one after the other on all of them (two cores): nobody
waits for a thread at the end of an operator, nor for Python between two.

run.py ─► python -m megatron_npr.demo.background FOLDER ─► phases-background.json, background.log, exit code
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_npr.demo.phases import POLL_SECONDS, Phases

PR_SET_PDEATHSIG = 1
LAST_LINES = 20


class BackgroundProcess:
    """The background process, for the length of a with-block; whoever leaves the block early ends it, as Ctrl-C would."""

    def __init__(self, folder: Path, phases: Phases, *, threads: int) -> None:
        self.log = folder / "background.log"
        self._phases = phases
        self._announced = set(phases.intervals)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "megatron_npr.demo.background", str(folder)]
        with self.log.open("a") as log:
            # A session of its own: Ctrl-C in the terminal reaches it once, through __exit__.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait()
            except KeyboardInterrupt:  # again: it stops now and loses its step
                continue

    def tell(self) -> None:
        """Prints what has been finished since the last time; RuntimeError where the process has failed."""
        self._phases.read()
        for name, seconds in self._phases.seconds.items():
            if name not in self._announced:
                print(f"{self._phases.number(name)} {name}: {seconds:.0f} s (background)", flush=True)
                self._announced.add(name)
        if self._process.poll():
            lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise RuntimeError(
                "\n".join([f"the background process has failed; the end of {self.log}:", *lines])
            )

    def finish(self) -> None:
        """Waits until all of it is done."""
        while self._process.poll() is None:
            try:
                self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                self.tell()
        self.tell()


def main(folder: Path) -> int:
    """The background process's entry point; its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)  # nobody goes on for a demo that was killed
    from megatron_npr.demo.run import Demo

    try:
        Demo(folder).run_background()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
