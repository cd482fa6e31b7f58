"""Worlds of processes for the tests, through torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.support.patience import SECONDS

ONE_MACHINE = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
"""torchrun's --standalone by number: a machine may not know its own name, nor "localhost" (a chroot has no /etc/hosts)."""


def worker_module(worker: str) -> str:
    """Started with `python -m`, a worker imports the tests' own modules as the tests do: tests.NAME."""
    return f"tests.distributed.workers.{worker}"


def worker_environment() -> dict[str, str]:
    """Ours, with the places where this process imports from."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def torchrun(module: str, arguments: Iterable[object], processes: int, timeout: float = SECONDS) -> None:
    """A world of `processes` that run a module; AssertionError with the end of what they said if one of them fails."""
    with tempfile.TemporaryDirectory() as logs:  # torchrun leaves its own behind
        launcher = [*ONE_MACHINE, f"--nproc-per-node={processes}", f"--log-dir={logs}", "-m", module]
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=worker_environment(),
        )
        with process:
            try:
                said, _ = process.communicate(timeout=timeout)
            except BaseException:
                # torchrun takes its processes down with it; were it killed, it would leave them
                process.terminate()
                raise
    assert process.returncode == 0, said[-6000:]


def run_worker(
    worker: str,
    arguments: Iterable[object],
    processes: int,
    timeout: float = SECONDS,
    *,
    through: str | None = None,
) -> str:
    """What rank 0 wrote into the file that is the last argument of each process: WORKER ARGUMENTS... OUT. `through`: a module
    that prepares the process and calls the worker's `main`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        modules = [worker_module(worker)] if through is None else [through, worker_module(worker)]
        torchrun(modules[0], (*modules[1:], *arguments, out), processes, timeout)
        return out.read_text()
