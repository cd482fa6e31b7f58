"""The largest memory of a phase: with peak_memory(device) as peak: ... ──► peak.gb"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Largest memory of a phase in bytes, known at its end: of torch's allocator on a GPU, of the process on a CPU."""

    num_bytes: int = 0

    @property
    def gb(self) -> float:
        return self.num_bytes / 1e9


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure a phase."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
    else:
        # Forgets the process's peak so far; proc(5). Where a sandbox forbids it, the figure is the peak since the start.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        yield peak
        peak.num_bytes = _resident_peak(Path("/proc/self/status").read_text())


def _resident_peak(status: str) -> int:
    """VmHWM of /proc/self/status in bytes."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
