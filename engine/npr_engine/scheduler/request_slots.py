"""What the running responses' budgets leave and how they sample, as arrays: a response has a request slot
while it runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npr_engine.sampling import SamplingParams


class RequestSlots:
    """Sampling parameters and budgets, [request slots] each.

    Attributes:
        tokens_left: what is left of max_tokens.
        last_position: the last position that a token may have.
        stop_ids: int32 [request slots, most stop tokens of any], padded with -1.
        num_constrained: how many of the taken slots are constrained.
    """

    def __init__(self, num_request_slots: int) -> None:
        self.tokens_left: NDArray[np.int64] = np.zeros(num_request_slots, np.int64)
        self.last_position: NDArray[np.int64] = np.zeros(num_request_slots, np.int64)
        self.temperature: NDArray[np.float32] = np.ones(num_request_slots, np.float32)
        self.top_p: NDArray[np.float32] = np.ones(num_request_slots, np.float32)
        self.top_k: NDArray[np.int32] = np.zeros(num_request_slots, np.int32)
        self.min_p: NDArray[np.float32] = np.zeros(num_request_slots, np.float32)
        self.penalty: NDArray[np.float32] = np.ones(num_request_slots, np.float32)
        self.constrained: NDArray[np.bool_] = np.zeros(num_request_slots, np.bool_)
        self.num_constrained = 0
        self.stop_ids: NDArray[np.int32] = np.empty((num_request_slots, 0), np.int32)
        self._free = list(range(num_request_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, params: SamplingParams, tokens_left: int, last_position: int) -> int:
        """A free slot, filled; there must be one."""
        slot = self._free.pop()
        self.tokens_left[slot], self.last_position[slot] = tokens_left, last_position
        self.temperature[slot], self.top_p[slot] = params.temperature, params.top_p
        # More than every token is no limit, whatever the number.
        self.top_k[slot], self.min_p[slot] = min(params.top_k, np.iinfo(np.int32).max), params.min_p
        self.penalty[slot], self.constrained[slot] = params.repetition_penalty, params.constrain
        self.num_constrained += params.constrain
        stops = len(params.stop_token_ids)
        if stops > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), stops), -1, np.int32)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[slot, :stops] = params.stop_token_ids
        return slot

    def release(self, slot: int) -> None:
        """Takes back a slot that is taken."""
        assert slot not in self._free, f"request slot {slot} released twice"
        self.stop_ids[slot] = -1
        self.num_constrained -= int(self.constrained[slot])
        self.constrained[slot] = False
        self._free.append(slot)

    def restore_order(self) -> None:
        """The free slots are handed out from the lowest on again, as at the beginning."""
        self._free.sort(reverse=True)
