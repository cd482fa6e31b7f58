"""Where the time of a run goes: metrics.jsonl ─► seconds by phase over its steps ─► a table, or the same as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_npr.monitoring.metrics import PHASE_SECONDS, STEP_SECONDS


@dataclass(frozen=True)
class PhaseShares:
    """`steps` steps of `seconds` wall time together, and the seconds of them in each phase, longest first."""

    steps: int
    seconds: float
    phases: Mapping[str, float]

    @property
    def covered(self) -> float:
        """The part of the wall time that is in some phase, 0 to 1."""
        return sum(self.phases.values()) / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "phases": dict(self.phases), "covered": self.covered}

    def table(self) -> str:
        """A line a phase: seconds a step and share of the wall time."""
        rows = [*self.phases.items(), ("other", self.seconds - sum(self.phases.values()))]
        lines = [f"{'phase':<20}{'seconds a step':>15}{'share':>9}"]
        lines += [f"{name:<20}{part / self.steps:>15.4f}{part / self.seconds:>9.2%}" for name, part in rows]
        lines += [f"{'step':<20}{self.seconds / self.steps:>15.4f}{'':>9} over {self.steps} steps"]
        return "\n".join(lines)


def phase_shares(records: Iterable[Mapping[str, Any]]) -> PhaseShares | None:
    """Sum the records of metrics.jsonl that have times; None where none has."""
    timed = [record for record in records if record.get(STEP_SECONDS)]
    if not timed:
        return None
    totals: dict[str, float] = {}
    for record in timed:
        for key, value in record.items():
            if key.startswith(PHASE_SECONDS):
                name = key.removeprefix(PHASE_SECONDS)
                totals[name] = totals.get(name, 0.0) + value
    ordered = dict(sorted(totals.items(), key=lambda item: -item[1]))
    return PhaseShares(len(timed), sum(record[STEP_SECONDS] for record in timed), ordered)
