"""Warnings about counts that jump: a share of the responses (or groups) that is quite another than in the steps before, or
that is nearly all of them in the first step.

Share (count of total) a step ──► odds against the mean odds of the last steps ──► a line
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 10
"""Steps that are compared with."""

LEAST = 0.05
FACTOR = 4.0

NEARLY_ALL = 0.9
USELESS = {
    "cut": "raise rollout.max_tokens, or see why responses do not end",
    "invalid": "while that stays so nothing is learned of parallel reasoning; npr eval writes what the model says",
    "dropped": "nothing is learned from these; npr eval writes what the model says",
    "flat_groups": "nothing is learned from these: their problems are too easy or too hard for the model",
}
"""Last part of the name of a share -> what to say where it is nearly all from the first step on: no later step will jump."""


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """Between 0 and 1 and neither of them: half a case more on either side, so that one case of few says little."""
        return (self.count + 0.5) / (self.total + 1)


class Jumps:
    """Finds the shares that jump: over 5 %, with odds p / (1 - p) over four times those of the mean of the last ten steps.

    Odds see a rise from 1 to 4 % as they see one from 50 to 80 %. What a first step shows is no jump, but for `faults`, which
    nobody expects, and for what is `USELESS` nearly always.
    """

    def __init__(self, faults: frozenset[str] = frozenset()) -> None:
        self._faults = faults
        self._before: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def take(self, shares: Mapping[str, Share]) -> list[str]:
        """A line for each share of this step that has jumped."""
        lines = []
        for name, share in shares.items():
            if not share.total:
                continue
            before = self._before[name]
            useless = USELESS.get(name.rpartition("/")[2])
            if useless and not before and share.value >= NEARLY_ALL:
                lines.append(f"{name}: {share.count} of {share.total} from the start: {useless}")
            usual = sum(before) / len(before) if before else self._first(name, share)
            if share.count > LEAST * share.total and _odds(share.value) > FACTOR * _odds(usual):
                lines.append(f"{name}: {share.count} of {share.total}, usually {usual:.1%}")
            before.append(share.value)
        return lines

    def _first(self, name: str, share: Share) -> float:
        return Share(0, share.total).value if name in self._faults else share.value


def _odds(share: float) -> float:
    return share / (1 - share)
