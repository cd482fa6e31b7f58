"""Whose turn it is: the items of a round, out of an endless row of shuffled passes over all of them.

(number of items, items a round, step, seed) ──► Place (pass, row) ──► Turn (pass, prompt, try) ──► rollouts.collect

A turn is named by numbers. Names that users give their problems name nothing here: they may be odd, and a problem comes again
with every pass, also twice within a round where a round spans two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_npr.data.prompts import EncodedProblem


class Place(NamedTuple):
    """A row of one pass over all items."""

    epoch: int
    row: int


@dataclass(frozen=True)
class Turn:
    """A prompt is asked in a pass (`epoch`), for the `attempt`-th time in it."""

    prompt: EncodedProblem
    epoch: int = 0
    attempt: int = 0

    @property
    def identity(self) -> tuple[int, int, int]:
        """What no other turn of a run has."""
        return self.epoch, self.prompt.row, self.attempt


def round_places(num_items: int, per_round: int, step: int, seed: int) -> list[Place]:
    """The places of one round; a pure function of the step, so nothing to save.

    Every pass is a new permutation; a round may span two passes, or many.
    """
    if not num_items:
        raise AssertionError("a round of no items")
    places: list[Place] = []
    position = step * per_round
    while len(places) < per_round:
        epoch, offset = divmod(position + len(places), num_items)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & (2**63 - 1))
        order = torch.randperm(num_items, generator=generator).tolist()
        places += [Place(epoch, row) for row in order[offset : offset + per_round - len(places)]]
    return places


def round_turns(prompts: Sequence[EncodedProblem], per_round: int, step: int, seed: int) -> list[Turn]:
    """The prompts of one round, each in its pass."""
    return [Turn(prompts[row], epoch) for epoch, row in round_places(len(prompts), per_round, step, seed)]
