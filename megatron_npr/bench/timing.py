"""How long something takes, and how much memory it adds at its peak."""

from __future__ import annotations

import functools
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
    return in_own_process(functools.partial(_prepare_and_measure, prepare))


def in_own_process(work: Callable[[], int]) -> int:
    """What picklable work returns in a fresh process, whose memory nothing else has touched."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, there))
    process.start()
    there.close()
    try:
        result: int = here.recv()
    except EOFError:
        raise RuntimeError(f"the measured process ended with code {process.exitcode}") from None
    finally:
        process.join()
    return result


def added_bytes(work: Callable[[], object]) -> int:
    """What the work adds to the peak of this process's resident memory. True only where nothing else allocates, and
    no earlier garbage is collected, meanwhile."""
    _forget_peak()
    before = _peak()
    result = work()
    added = _peak() - before
    del result
    return added


def _prepare_and_measure(prepare: Callable[[], Callable[[], object]]) -> int:
    return added_bytes(prepare())


def _send(work: Callable[[], int], out: Connection) -> None:
    out.send(work())


def _forget_peak() -> None:
    """Linux: the high-water mark starts again at what is resident now."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def _peak() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
