"""How each row of a step is sampled: its number between 0 and 1, its distribution, what it may not draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npr_engine.language.constraint import Constraint
from npr_engine.scheduler.batch import SampleInputs
from npr_engine.scheduler.request_slots import RequestSlots
from npr_engine.scheduler.rows import Rows

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


class Draws:
    """Reads the rows and request slots of a scheduler."""

    def __init__(self, rows: Rows, request_slots: RequestSlots, constraint: Constraint) -> None:
        self._rows, self._request_slots, self._constraint = rows, request_slots, constraint

    def inputs(self, sampled: NDArray[np.int32]) -> SampleInputs:
        """How to sample after the rows `sampled`, int32 [S], of a planned engine step."""
        rows, given = self._rows, self._request_slots
        slot = rows.request_slot[sampled]
        penalty = np.where(rows.step_start[sampled] >= 0, given.penalty[slot], np.float32(1.0))
        return SampleInputs(
            uniforms=uniforms(rows.key[sampled], rows.position[sampled]),
            temperature=given.temperature[slot],
            top_p=given.top_p[slot],
            top_k=given.top_k[slot],
            min_p=given.min_p[slot],
            penalty=penalty,
            penalised=self._penalised(sampled, penalty),
            masks=self._masks(sampled, slot),
        )

    def _masks(self, sampled: NDArray[np.int32], slot: NDArray[np.int32]) -> NDArray[np.int32]:
        """What each sampled row may not draw, as rows of `constraint.forbidden`; 0 where it is not constrained."""
        if self._request_slots.num_constrained == 0:
            return np.zeros(len(sampled), np.int32)
        masks = self._constraint.masks(self._rows.state[sampled], self._rows.phase[sampled])
        return np.where(self._request_slots.constrained[slot], masks, np.int32(0))

    def _penalised(self, sampled: NDArray[np.int32], penalty: NDArray[np.float32]) -> NDArray[np.int32]:
        """Tokens of the open step of each sampled row, int32 [S, L], padded with -1."""
        if (penalty == 1.0).all():
            return np.empty((len(sampled), 0), np.int32)
        start = self._rows.step_start[sampled]
        length = np.where(penalty == 1.0, 0, self._rows.num_tokens[sampled] - start)
        columns = np.arange(length.max())
        inside = columns < length[:, None]
        source = np.where(inside, start[:, None] + columns, 0)
        return np.where(inside, self._rows.tokens[sampled[:, None], source], -1).astype(np.int32)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int32]) -> NDArray[np.float64]:
    """Uniform numbers by identity, float64 [S] in [0, 1): a draw depends on the branch and the position, not on the
    batch that it is made in. splitmix64 (https://prng.di.unimi.it/splitmix64.c) at state key + position."""
    state = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    state ^= state >> np.uint64(31)
    drawn: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn
