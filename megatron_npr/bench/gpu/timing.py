"""Clocks and counters of the GPU bench: seconds, host waits, added memory, and the roofs that figures are shares of.

Each takes the device; on a CPU they count what a CPU has, which is how the tests run them.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable

import torch

from megatron_npr.bench.timing import added_bytes as added_resident_bytes

WAITING = re.compile(r"cuda(Stream|Device|Event)Synchronize")


def synchronize(device: torch.device) -> None:
    """Until the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median of single runs after three that warm up; each waits for the device."""
    seconds = []
    for run in range(repeats + 3):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if run >= 3:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def waits(work: Callable[[], object], device: torch.device) -> list[str]:
    """The calls in which the host waited for the device, as the profiler saw them, one entry a call; its own one at the
    end is not among them. Warm up before."""
    if device.type != "cuda":
        return []
    synchronize(device)
    with torch.profiler.profile() as profiler, torch.profiler.record_function("measured"):
        work()
    events = list(profiler.events())
    measured = next(event.time_range for event in events if event.name == "measured")
    return sorted(
        event.name
        for event in events
        if WAITING.search(event.name) and measured.start <= event.time_range.start <= measured.end
    )


def added_bytes(work: Callable[[], object], device: torch.device) -> int:
    """What the work adds to the memory in use at its peak: torch's allocator on a GPU, the process on a CPU."""
    if device.type != "cuda":
        return added_resident_bytes(work)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy of so many bytes within the device's memory."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two random square matrices: what training is measured against."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, device=device, dtype=torch.float32, generator=generator).to(dtype)
        for _ in range(2)
    )
    return 2 * size**3 / median_seconds(lambda: left @ right, device)
