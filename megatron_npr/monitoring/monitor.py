"""One call a step for whoever watches a stage: metrics to disk, progress to the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_npr.config import LogSettings, RunSettings
from megatron_npr.monitoring.jumps import Jumps, Share
from megatron_npr.monitoring.metrics import PHASE_SECONDS, STEP_SECONDS, MetricsLog
from megatron_npr.monitoring.progress import Progress
from megatron_npr.monitoring.spans import PhaseTimes, timed_phases
from megatron_npr.runtime.process_world import World

FAULTS = frozenset({"verifier_timeouts", "verifier_deaths"})


@dataclass(frozen=True)
class Monitor:
    """Metrics and progress of one stage on this rank (both silent on ranks that do not write)."""

    metrics: MetricsLog
    progress: Progress
    is_main: bool
    times: PhaseTimes
    jumps: Jumps = field(default_factory=lambda: Jumps(FAULTS))
    warned_of: dict[str, float] = field(default_factory=dict)

    def step(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        tokens: int,
        shown: Sequence[str],
        shares: Mapping[str, Share] = MappingProxyType({}),
    ) -> None:
        """Log all values of a step, of the shares the counts, and the seconds by phase since the step before (with its save);
        show the named values, and a line for a share that jumps."""
        whole, phases = self.times.take()
        counts = {name: share.count for name, share in shares.items()}
        seconds = {STEP_SECONDS: whole, **{PHASE_SECONDS + name: value for name, value in phases.items()}}
        self.metrics.log(step, tokens=tokens, **values, **counts, **seconds)
        for line in self.jumps.take(shares) if self.is_main else ():
            self.progress.warn(f"step {step}: {line}")
        self.progress.advance(1, tokens=tokens, **{name: values[name] for name in shown})

    def warn_above(self, step: int, name: str, value: float, limit: float) -> None:
        """A line where a figure is above its limit (0: it has none), and again when it has doubled since."""
        if 0 < limit < value and value >= 2 * self.warned_of.get(name, 0.0):
            self.warned_of[name] = value
            self.progress.warn(f"step {step}: {name} is {value:.3g}, above {limit:g}")


@contextlib.contextmanager
def monitored(
    name: str,
    run: RunSettings,
    log: LogSettings,
    world: World,
    *,
    total: int,
    first: int = 0,
    unit: str = "steps",
) -> Iterator[Monitor]:
    """A Monitor for the length of a stage."""
    with (
        MetricsLog(run.dir, log.backend, world.is_main, first) as metrics,
        Progress(name, total, unit, first=first, shown=world.is_main and log.progress) as progress,
        timed_phases(PhaseTimes()) as times,
    ):
        yield Monitor(metrics, progress, world.is_main, times)


def mean(values: Iterable[float]) -> float:
    """Mean of the values; NaN of none."""
    items = [float(value) for value in values]
    return sum(items) / len(items) if items else float("nan")
