"""Settings of foreign libraries that hold for a whole command: set where a process starts, undone where the command ends.

Imports none of them, so that help and errors of the command line come at once.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

from megatron_npr.repairs.repair import Repair

_SPINS = "GOMP_SPINCOUNT"


@contextlib.contextmanager
def process_settings() -> Iterator[None]:
    """Entered by `main` before torch is loaded; see `REPAIRS`."""
    before = os.environ.get(_SPINS)
    # Threads that wait for each other sleep after some 20 us instead of spinning for ms; alone that costs nothing.
    os.environ.setdefault(_SPINS, "20000")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core|megatron_npr\.repairs\.megatron_on_cpu")
            # torch counts a collective's own wrapper as its caller, so that is who it warns whoever calls.
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger"
            )
            yield
    finally:
        if before is None:
            del os.environ[_SPINS]


_WHERE = "`process.process_settings`, while a command runs"
REPAIRS = (
    Repair(
        f"environment variable {_SPINS}",
        "torch==2.13.0",
        "OpenMP threads that wait spin for ms: ten times slower where another process wants the same cores",
        "libgomp lets waiting threads sleep soon",
        _WHERE,
    ),
    Repair(
        "warnings of megatron.core",
        "megatron-core==0.16.1",
        "each run begins with warnings about packages that are not installed",
        "it warns where it would use them",
        _WHERE,
    ),
    Repair(
        "warnings of torch.distributed.c10d_logger",
        "torch==2.13.0",
        "each run that trains begins with warnings about collectives that Megatron still calls by their old names",
        "Megatron calls `reduce_scatter_single` and `all_gather_single`",
        _WHERE,
    ),
    Repair(
        "level of logger math_verify",
        "math-verify==0.9.0",
        "it logs every answer that it cannot read",
        "it does not",
        "`rl/verifier_worker.py`: `main`, a process of its own",
    ),
    Repair(
        "warnings and output of modelopt",
        "nvidia-modelopt==0.47.0",
        "its import lists every optional package that is not there",
        "it does not",
        "`hf/fp8_export.py`: `_modelopt`, while it is imported",
    ),
)
