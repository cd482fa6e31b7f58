"""What the engine knows about its open branches, as arrays.

An engine step touches these arrays as a whole, so thousands of branches cost no Python loop.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

FIRST_ROWS = 16
Element = TypeVar("Element", bound=np.generic)


class Rows:
    """A row is a trunk, a branch, or a prompt that is being filled. Rows grow on demand.

    Attributes:
        block_table: int32 [rows, width]; `block_table[r, :length[r]]` are the KV slots that row r sees, in order (a fork
            copies this row of numbers, a join concatenates the rows of branches); those up to `reserved[r]` are its own
            for later.
        tokens: int32 [rows, capacity]; `tokens[r, :num_tokens[r]]` are its own tokens, `num_computed_tokens[r]` of them
            have KV. A trunk's first one is the last token of the prompt. Beside each token: logprobs, sampler_logprobs,
            steps (engine steps), positions, forced.
        position: position of the next token to compute.
        num_scheduled_tokens: slots beyond `length` that the engine step which is being planned will use.
        decoding: one token pending, sample after it: the steady state.
        generation: serial number of the row's allocation; below `length` its block table is never rewritten.
        request_slot: the response's index in RequestSlots, -1 for prompts.
        key: uint64, names the branch to the sampler.
        state: the parser's State after the row's last token.
        phase: of the text since the row's last tag (see Constraint); kept for constrained responses only.
        step_start: own tokens from there on are inside a <step>; -1 outside.
    """

    def __init__(self, width: int, capacity: int) -> None:
        self.block_table: NDArray[np.int32] = np.zeros((FIRST_ROWS, width), np.int32)
        self.tokens: NDArray[np.int32] = np.zeros((FIRST_ROWS, capacity), np.int32)
        self.logprobs: NDArray[np.float32] = np.zeros((FIRST_ROWS, capacity), np.float32)
        self.sampler_logprobs: NDArray[np.float32] = np.zeros((FIRST_ROWS, capacity), np.float32)
        self.steps: NDArray[np.int32] = np.zeros((FIRST_ROWS, capacity), np.int32)
        self.positions: NDArray[np.int32] = np.zeros((FIRST_ROWS, capacity), np.int32)
        self.forced: NDArray[np.bool_] = np.zeros((FIRST_ROWS, capacity), np.bool_)
        self.num_tokens: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.num_computed_tokens: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.length: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.reserved: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.num_scheduled_tokens: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.position: NDArray[np.int32] = np.zeros(FIRST_ROWS, np.int32)
        self.decoding: NDArray[np.bool_] = np.zeros(FIRST_ROWS, np.bool_)
        self.generation: NDArray[np.int64] = np.zeros(FIRST_ROWS, np.int64)
        self._generations = 0
        self.request_slot: NDArray[np.int32] = np.full(FIRST_ROWS, -1, np.int32)
        self.key: NDArray[np.uint64] = np.zeros(FIRST_ROWS, np.uint64)
        self.state: NDArray[np.int8] = np.zeros(FIRST_ROWS, np.int8)
        self.phase: NDArray[np.int8] = np.zeros(FIRST_ROWS, np.int8)
        self.step_start: NDArray[np.int32] = np.full(FIRST_ROWS, -1, np.int32)
        self._free = list(range(FIRST_ROWS - 1, -1, -1))

    @property
    def width(self) -> int:
        return int(self.block_table.shape[1])

    def allocate(self, request_slot: int, key: int, position: int) -> int:
        """A clean row; the arrays may move."""
        if not self._free:
            self._grow_rows()
        row = self._free.pop()
        for array in (
            self.num_tokens,
            self.num_computed_tokens,
            self.length,
            self.reserved,
            self.num_scheduled_tokens,
            self.state,
            self.phase,
        ):
            array[row] = 0
        self._generations += 1
        self.generation[row] = self._generations
        self.position[row], self.request_slot[row] = position, request_slot
        self.key[row], self.step_start[row] = key, -1
        return row

    def release(self, rows: list[int]) -> None:
        """Takes back rows that are allocated."""
        self.decoding[rows] = False
        self.request_slot[rows] = -1
        self._free.extend(rows)

    def restore_order(self) -> None:
        """The free rows are handed out from the lowest on again, as those of new arrays are."""
        self._free.sort(reverse=True)

    def in_use(self) -> NDArray[np.int64]:
        """All rows that are allocated."""
        return np.setdiff1d(np.arange(len(self.num_tokens)), self._free)

    def need_width(self, width: int) -> None:
        """Makes the block tables wide enough for rows that see `width` tokens; a no-op where they are."""
        if width > self.width:
            self.block_table = _widen(self.block_table, max(width, 2 * self.width))

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
        rows = len(self.num_tokens)
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        self.request_slot[rows:] = self.step_start[rows:] = -1
        self._free = list(range(2 * rows - 1, rows - 1, -1))

    def check_integrity(self, used: list[int]) -> None:
        """`used` are exactly the rows in use."""
        assert len(set(used)) == len(used), f"rows with two owners: {sorted(used)}"
        assert sorted([*used, *self._free]) == list(range(len(self.num_tokens))), (
            sorted(used),
            sorted(self._free),
        )
        assert set(np.flatnonzero(self.decoding).tolist()) <= set(used)
        pending = self.num_tokens - self.num_computed_tokens
        assert (pending[used] >= 0).all() and (self.length[used] <= self.reserved[used]).all()
        assert (pending[self.decoding] == 1).all()


def _widen(array: NDArray[Element], columns: int) -> NDArray[Element]:
    wide = np.zeros((array.shape[0], columns), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
