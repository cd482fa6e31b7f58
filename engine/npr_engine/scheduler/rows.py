"""What the engine knows about its open branches and running responses, as arrays.

A step touches these arrays as a whole, so thousands of branches cost no Python loop.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from npr_engine.sampling import SamplingParams

FIRST_ROWS = 16
Element = TypeVar("Element", bound=np.generic)


class Rows:
    """A row is a trunk, a branch, or a prompt that is being filled. Rows grow on demand.

    Attributes:
        table: int32 [rows, width]; `table[r, :length[r]]` are the KV slots that row r sees (a fork copies
        this row of
            numbers, a join concatenates the rows of branches); those up to `reserved[r]` are its own for
            later.
        tokens: int32 [rows, capacity]; `tokens[r, :known[r]]` are its own tokens, `fed[r]` of them have KV.
        A trunk's
            first one is the last token of the prompt. Beside each token: logprobs, sampler_logprobs, steps,
            positions, forced.
        position: position of the next token to feed.
        promised: slots beyond `length` that the step which is being planned will use.
        decoding: one token pending, sample after it: the steady state.
        birth: serial number of the row's allocation; below `length` its table row is never rewritten.
        seat: the response's index in Seats.
        key: uint64, names the branch to the sampler.
        state: the parser's State after the row's last token.
        phase: of the text since the row's last tag (see Constraint); kept for constrained responses only.
        step_start: own tokens from there on are inside a <step>; -1 outside.
    """

    def __init__(self, width: int, capacity: int) -> None:
        self.table: NDArray[np.int32] = np.zeros((FIRST_ROWS, width), np.int32)
        self.tokens: NDArray[np.int32] = np.zeros((FIRST_ROWS, capacity), np.int32)
        self.logprobs: NDArray[np.float32] = np.zeros((FIRST_ROWS, capacity), np.float32)
        self.sampler_logprobs: NDArray[np.float32] = np.zeros((FIRST_ROWS, capacity), np.float32)
        self.steps: NDArray[np.int32] = np.zeros((FIRST_ROWS, capacity), np.int32)
        self.positions: NDArray[np.int32] = np.zeros((FIRST_ROWS, capacity), np.int32)
        self.forced: NDArray[np.bool_] = np.zeros((FIRST_ROWS, capacity), np.bool_)
        self.known: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.fed: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.length: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.reserved: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.promised: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.position: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.decoding: NDArray[np.bool_] = np.zeros(FIRST_ROWS, np.bool_)
        self.birth: NDArray[np.int64] = np.zeros(FIRST_ROWS, np.int64)
        self._births = 0
        self.seat: NDArray[np.int32] = np.full(FIRST_ROWS, -1, np.int32)
        self.key: NDArray[np.uint64] = np.zeros(FIRST_ROWS, np.uint64)
        self.state: NDArray[np.int8] = np.zeros(FIRST_ROWS, np.int8)
        self.phase: NDArray[np.int8] = np.zeros(FIRST_ROWS, np.int8)
        self.step_start: NDArray[np.int32] = np.full(FIRST_ROWS, -1, np.int32)
        self._free = list(range(FIRST_ROWS - 1, -1, -1))

    @property
    def width(self) -> int:
        return int(self.table.shape[1])

    @property
    def num_used(self) -> int:
        return len(self.known) - len(self._free)

    def allocate(self, seat: int, key: int, position: int) -> int:
        """A clean row; the arrays may move."""
        if not self._free:
            self._grow_rows()
        row = self._free.pop()
        for array in (
            self.known,
            self.fed,
            self.length,
            self.reserved,
            self.promised,
            self.state,
            self.phase,
        ):
            array[row] = 0
        self._births += 1
        self.birth[row] = self._births
        self.position[row], self.seat[row], self.key[row], self.step_start[row] = position, seat, key, -1
        return row

    def release(self, rows: list[int]) -> None:
        self.decoding[rows] = False
        self.seat[rows] = -1
        self._free.extend(rows)

    def in_use(self) -> NDArray[np.int64]:
        """All rows that are allocated."""
        return np.setdiff1d(np.arange(len(self.known)), self._free)

    def need_width(self, width: int) -> None:
        """Makes table and tokens wide enough for rows of `width` tokens; a no-op when they are."""
        if width > self.width:
            self.table = _widen(self.table, max(width, 2 * self.width))

    def need_capacity(self, tokens: int) -> None:
        """Makes room for rows with `tokens` tokens of their own; a no-op where there is."""
        capacity = self.tokens.shape[1]
        if tokens <= capacity:
            return
        columns = max(tokens, 2 * capacity)
        self.tokens, self.steps = _widen(self.tokens, columns), _widen(self.steps, columns)
        self.positions, self.forced = _widen(self.positions, columns), _widen(self.forced, columns)
        self.logprobs = _widen(self.logprobs, columns)
        self.sampler_logprobs = _widen(self.sampler_logprobs, columns)

    def _grow_rows(self) -> None:
        rows = len(self.known)
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        self.seat[rows:] = self.step_start[rows:] = -1
        self._free = list(range(2 * rows - 1, rows - 1, -1))

    def check_integrity(self, used: list[int]) -> None:
        """`used` are exactly the rows in use."""
        assert len(set(used)) == len(used), f"rows with two owners: {sorted(used)}"
        assert sorted([*used, *self._free]) == list(range(len(self.known))), (
            sorted(used),
            sorted(self._free),
        )
        assert set(np.flatnonzero(self.decoding).tolist()) <= set(used)
        assert (self.fed[used] <= self.known[used]).all() and (self.length[used] <= self.reserved[used]).all()
        assert ((self.known - self.fed)[self.decoding] == 1).all()


def _widen(array: NDArray[Element], columns: int) -> NDArray[Element]:
    wide = np.zeros((array.shape[0], columns), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide


class Seats:
    """What the running responses' budgets leave and how they sample, as arrays over seats.

    `tokens_left` of max_tokens; `last_position`, the last one that a token may have; `stop_ids` int32
    [seats, most], padded with -1; `num_constrained` of the seats taken are constrained.
    """

    def __init__(self, num_seats: int) -> None:
        self.tokens_left: NDArray[np.int64] = np.zeros(num_seats, np.int64)
        self.last_position: NDArray[np.int64] = np.zeros(num_seats, np.int64)
        self.temperature: NDArray[np.float32] = np.ones(num_seats, np.float32)
        self.top_p: NDArray[np.float32] = np.ones(num_seats, np.float32)
        self.top_k: NDArray[np.int32] = np.zeros(num_seats, np.int32)
        self.min_p: NDArray[np.float32] = np.zeros(num_seats, np.float32)
        self.penalty: NDArray[np.float32] = np.ones(num_seats, np.float32)
        self.constrained: NDArray[np.bool_] = np.zeros(num_seats, np.bool_)
        self.num_constrained = 0
        self.stop_ids: NDArray[np.int32] = np.empty((num_seats, 0), np.int32)
        self._free = list(range(num_seats - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, params: SamplingParams, tokens_left: int, last_position: int) -> int:
        seat = self._free.pop()
        self.tokens_left[seat], self.last_position[seat] = tokens_left, last_position
        self.temperature[seat], self.top_p[seat], self.top_k[seat] = (
            params.temperature,
            params.top_p,
            params.top_k,
        )
        self.min_p[seat], self.penalty[seat] = params.min_p, params.repetition_penalty
        self.constrained[seat] = params.constrain
        self.num_constrained += params.constrain
        stops = len(params.stop_token_ids)
        if stops > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), stops), -1, np.int32)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[seat, :stops] = params.stop_token_ids
        return seat

    def leave(self, seat: int) -> None:
        assert seat not in self._free, f"seat {seat} left twice"
        self.stop_ids[seat] = -1
        self.num_constrained -= int(self.constrained[seat])
        self.constrained[seat] = False
        self._free.append(seat)
