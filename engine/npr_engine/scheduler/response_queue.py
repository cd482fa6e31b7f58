"""Who waits and who runs. First come, first served: the oldest response is never preempted, so everything ends.

add ─► waiting ─► admit ─► running ─► finish
          ▲                   │
          └───── preempt ─────┘   tokens stay, KV is computed again
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npr_engine.language.grammar import Grammar
from npr_engine.scheduler.limits import Counters, Limits
from npr_engine.scheduler.memory import Memory
from npr_engine.scheduler.request_slots import RequestSlots
from npr_engine.scheduler.response_state import Branch, Record, Request, ResponseState
from npr_engine.scheduler.rows import Rows


@dataclass(frozen=True)
class Finished:
    """A response that has ended, in packed order: its record and branch ids int32 [R]."""

    request: Request
    reason: str
    record: Record
    branch_ids: NDArray[np.int32]


class ResponseQueue:
    """Responses in order of arrival, waiting and running; gives request slots, rows and KV to those that run.

    Attributes:
        waiting, running: responses, oldest first.
    """

    def __init__(
        self, limits: Limits, counters: Counters, rows: Rows, request_slots: RequestSlots, memory: Memory
    ) -> None:
        self.waiting: deque[ResponseState] = deque()
        self.running: list[ResponseState] = []
        self._limits, self._counters = limits, counters
        self._rows, self._request_slots, self._memory = rows, request_slots, memory
        self._in_slot: list[ResponseState | None] = [None] * limits.max_running_requests
        self._finished: list[Finished] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request, grammar: Grammar) -> None:
        """Queues a request."""
        params, prompt = request.params, request.prompt_ids
        self._rows.need_width(len(prompt) + params.max_tokens + 1)
        record = Record.given(prompt[-1:].tolist(), len(prompt) - 1, -1)
        trunk = Branch(0, request.key, record=record, num_streamed=1)
        self.waiting.append(
            ResponseState(request, self._arrivals, grammar.parser(), trunk, params.max_tokens)
        )
        self._arrivals += 1

    def find(self, request_id: str) -> ResponseState | None:
        """The response of a request that has not ended; None where there is none of that id."""
        for response in (*self.running, *self.waiting):
            if response.request.request_id == request_id:
                return response
        return None

    def in_slot(self, request_slot: int) -> ResponseState | None:
        """The response that has the request slot."""
        return self._in_slot[request_slot]

    def owner(self, row: int) -> ResponseState:
        """The running response that a row of a trunk or a branch belongs to."""
        response = self._in_slot[self._rows.request_slot[row]]
        assert response is not None
        return response

    def admit(self) -> Iterator[ResponseState]:
        """Starts the next ones, as long as their tokens fit beside a block for each response that runs."""
        while self.waiting and self._request_slots.num_free:
            response = self.waiting[0]
            headroom = min(len(self.running), self._limits.num_blocks // 16)
            if not self._memory.fits(response, headroom, self._counters.steps):
                return
            self.waiting.popleft()
            params, prompt_length = response.request.params, len(response.request.prompt_ids)
            last_position = prompt_length + (params.max_critical_path or params.max_tokens) - 1
            slot = self._request_slots.allocate(params, response.tokens_left, last_position)
            response.request_slot, self._in_slot[slot] = slot, response
            self.running.append(response)
            self._memory.admit(response, self._counters.steps)
            response.work = response.all_work()
            yield response

    def preempt(self, response: ResponseState) -> None:
        """Back to the queue, before all that came later; its tokens stay, its KV is recomputed."""
        self._counters.preemptions += 1
        on_rows = [branch.row for branch in response.branches_on_rows()]
        self._counters.recomputed_tokens += int(self._rows.num_computed_tokens[on_rows].sum())
        self._stop(response)
        self.waiting.appendleft(response)

    def finish(self, response: ResponseState, reason: str) -> None:
        """Ends a response, wherever it is, with what it has."""
        if response.request_slot >= 0:
            self._stop(response)
        else:
            self.waiting.remove(response)
        record, branch_ids = response.packed()
        self._counters.forced_tokens += int(record.forced.sum())
        self._finished.append(Finished(response.request, reason, record, branch_ids))

    def take_finished(self) -> list[Finished]:
        """What has ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def by_arrival(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, oldest response first, the rows of a response in order of their number."""
        order = {response.request_slot: place for place, response in enumerate(self.running)}
        places = [order[slot] for slot in self._rows.request_slot[rows].tolist()]
        return rows[np.argsort(places, kind="stable")] if len(rows) > 1 else rows

    def first_come(self, decoding: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """The rows that decode in this engine step: all, or those of the oldest responses, whole responses only."""
        if len(decoding) <= room:
            return decoding
        ordered = self.by_arrival(decoding)
        slots = self._rows.request_slot[ordered]
        starts = np.flatnonzero(np.concatenate(([True], slots[1:] != slots[:-1])))
        return ordered[: starts[starts <= room].max()]

    def check_integrity(self) -> None:
        """Asserts that each request slot has one owner or is free, and that service is in order of arrival."""
        taken = [response.request_slot for response in self.running]
        assert len(set(taken)) == len(taken)
        assert self._request_slots.num_free + len(taken) == self._limits.max_running_requests
        assert all(self._in_slot[response.request_slot] is response for response in self.running)
        arrivals = [response.arrival for response in (*self.running, *self.waiting)]
        assert arrivals == sorted(arrivals), "service is out of order"
        assert all(self._request_slots.tokens_left[slot] >= 0 for slot in taken)

    def _stop(self, response: ResponseState) -> None:
        """Takes request slot, rows and KV from a running response."""
        slot = response.request_slot
        response.tokens_left = int(self._request_slots.tokens_left[slot])
        self._memory.evacuate(response)
        self.running.remove(response)
        self._in_slot[slot] = None
        self._request_slots.release(slot)
        response.request_slot = -1
