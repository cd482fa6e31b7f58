"""How long something takes, and how much memory it adds at its peak."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection


def median_seconds(work: Callable[[], object], *, repeats: int = 7) -> float:
    """Median wall time after one run that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def peak_bytes(prepare: Callable[[], Callable[[], object]]) -> int:
    """What the work adds to the peak of resident memory, in a process of its own: `prepare()` makes inputs and warms
    up, the work that it returns runs once. Both must be picklable."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, there))
    process.start()
    there.close()
    try:
        added: int = here.recv()
    except EOFError:
        raise RuntimeError(f"the measured process ended with code {process.exitcode}") from None
    finally:
        process.join()
    return added


def added_bytes(work: Callable[[], object]) -> int:
    """What the work adds to the peak of this process's resident memory."""
    _forget_peak()
    before = _peak()
    result = work()
    added = _peak() - before
    del result
    return added


def _measure(prepare: Callable[[], Callable[[], object]], out: Connection) -> None:
    out.send(added_bytes(prepare()))


def _forget_peak() -> None:
    """Linux: the high-water mark starts again at what is resident now."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def _peak() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
