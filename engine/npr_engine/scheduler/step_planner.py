"""What the next engine step computes: chunks of prompts and of known tokens, and one token of every branch
that decodes.

Chunks leave room for the decoding of older responses only: the oldest always gets on, and where all do not
fit, the youngest wait. Where KV slots run out the youngest response gives way.
"""

from __future__ import annotations

import numpy as np

from npr_engine.kvcache.prompt_cache import PromptKV
from npr_engine.scheduler.batch import Batch
from npr_engine.scheduler.limits import Counters, Limits
from npr_engine.scheduler.memory import Memory
from npr_engine.scheduler.response_queue import ResponseQueue
from npr_engine.scheduler.response_state import Branch, Feed, Join, Open, ResponseState, Resume
from npr_engine.scheduler.rows import Rows
from npr_engine.scheduler.step_plan import StepPlan


class StepPlanner:
    """Admits responses, does their work, reserves KV slots; makes the Batch of an engine step."""

    def __init__(
        self, limits: Limits, counters: Counters, rows: Rows, memory: Memory, queue: ResponseQueue
    ) -> None:
        self._limits, self._counters = limits, counters
        self._rows, self._memory, self._queue = rows, memory, queue
        self._filling: list[PromptKV] = []  # prompts whose KV is not complete

    def plan(self) -> Batch | None:
        """The next engine step, or None when nothing is left to do."""
        for response in self._queue.admit():
            self._start_filling(response)
        self._reserve_decoding()
        plan = StepPlan(self._rows, 0)
        self._do_all_work(plan)
        room = self._limits.max_batch_tokens - plan.num_chunk_tokens
        decoding = self._queue.first_come(np.flatnonzero(self._rows.decoding), room)
        if len(decoding) + plan.num_chunk_tokens == 0:
            assert len(self._queue) == 0, "the scheduler is stuck"
            return None
        counters, pool = self._counters, self._memory.pool
        counters.computed_tokens += len(decoding) + plan.num_chunk_tokens
        counters.peak_blocks = max(counters.peak_blocks, pool.num_blocks - pool.num_free)
        return plan.build(decoding)

    def drop_prompts(self) -> None:
        """Stops filling prompts: their KV is void."""
        for prompt in self._filling:
            self._rows.release([prompt.row])
            prompt.row = -1
        self._filling = []

    def _start_filling(self, response: ResponseState) -> None:
        """Gives the response's prompt a row to compute its KV on, where it is neither there nor on its way."""
        prompt, rows = response.prompt, self._rows
        assert prompt is not None
        if prompt.ready or prompt.row >= 0:
            return
        length = len(prompt.token_ids)
        prompt.row = rows.allocate(request_slot=-1, key=0, position=0)
        rows.need_capacity(length)
        rows.tokens[prompt.row, :length], rows.num_tokens[prompt.row] = prompt.token_ids, length
        rows.block_table[prompt.row, :length], rows.reserved[prompt.row] = prompt.slots, length
        self._filling.append(prompt)

    def _do_all_work(self, plan: StepPlan) -> None:
        """Chunks of prompts, of recomputation and of forced text, oldest response first."""
        limit, running = self._limits.max_batch_tokens, list(self._queue.running)
        slots = self._rows.request_slot[np.flatnonzero(self._rows.decoding)]
        if any([response.work for response in running]):  # noqa: C419 (a generator takes twice as long)
            decoding = np.bincount(slots, minlength=self._limits.max_running_requests)
            taken = np.cumsum(decoding[[response.request_slot for response in running]]).tolist()
            for response, older in zip(running, taken, strict=True):
                plan.room = limit - older - plan.num_chunk_tokens
                if response.work and response.request_slot >= 0 and plan.room > 0:
                    assert response.prompt is not None
                    self._fill(response.prompt, plan)
                    self._do_work(response, plan)
        plan.room = limit - len(slots) - plan.num_chunk_tokens
        for prompt in list(self._filling):  # those whose users are gone
            self._fill(prompt, plan)

    def _fill(self, prompt: PromptKV, plan: StepPlan) -> None:
        """The next chunk of a prompt whose KV is not complete."""
        count = min(len(prompt.token_ids) - prompt.num_computed_tokens, plan.room)
        if prompt.ready or count <= 0:
            return
        plan.add(prompt.row, count)
        prompt.num_computed_tokens += count
        prompt.planned_step = self._counters.steps
        if prompt.ready:
            self._memory.retired.append(prompt.row)
            prompt.row = -1
            self._filling.remove(prompt)

    def _do_work(self, response: ResponseState, plan: StepPlan) -> None:
        """As much of the response's work as fits into this engine step, in order."""
        assert response.prompt is not None
        while response.work and response.prompt.ready:
            match response.work[0]:
                case Feed() as feed:
                    if not self._feed(response, feed, plan):
                        return
                case Resume(branches):
                    if not self._resume(response, branches, plan):
                        return
                case Open(fork):
                    self._memory.open(response, fork)
                    self._counters.forks += 1
                case Join(fork):
                    self._memory.join(response, fork)
                    self._counters.joins += 1
            response.work.popleft()

    def _feed(self, response: ResponseState, feed: Feed, plan: StepPlan) -> bool:
        """Plans the next chunk; False where the rest has to wait."""
        row = feed.branch.row
        until = int(self._rows.num_tokens[row]) if feed.until is None else feed.until
        pending = until - int(self._rows.num_computed_tokens[row])
        count = min(pending, plan.room)
        if pending and (count == 0 or not self._reserve(response, row, count)):
            return False
        if count:
            plan.add(row, count)
        return count == pending

    def _resume(self, response: ResponseState, branches: tuple[Branch, ...], plan: StepPlan) -> bool:
        """Plans all that is pending of the branches, sampled after, if it fits; else what fits without their
        last tokens, which wait for each other."""
        rows = [branch.row for branch in branches]
        pending = (self._rows.num_tokens[rows] - self._rows.num_computed_tokens[rows]).tolist()
        whole = sum(pending) <= plan.room
        for row, count in zip(rows, pending, strict=True):
            take = count if whole else min(count - 1, plan.room)
            if take and not self._reserve(response, row, take):
                return False
            if take and not whole:
                plan.add(row, take)
        if whole:
            for row, count in zip(rows, pending, strict=True):
                plan.add(row, count, sample=True)
        return whole

    def _reserve_decoding(self) -> None:
        """A KV slot for the next token of every branch; the youngest response gives way where there is none."""
        rows = self._rows
        decoding = np.flatnonzero(rows.decoding)
        rows.num_scheduled_tokens[decoding] = 1
        full = decoding[rows.length[decoding] == rows.reserved[decoding]]
        if len(full) == 0:
            return
        short = self._memory.extend(full, [self._queue.owner(row) for row in full.tolist()])
        for row in self._queue.by_arrival(short).tolist():
            if not rows.decoding[row]:
                continue  # preempted for an older one
            response = self._queue.owner(row)
            if not self._reserve(response, row, 1):
                self._make_way(response)

    def _reserve(self, response: ResponseState, row: int, count: int) -> bool:
        """KV slots for a row, at the cost of younger responses; False where older ones hold them."""
        while not self._memory.reserve(response, row, count, self._counters.steps):
            youngest = self._queue.running[-1]
            if youngest is response:
                return False
            self._make_way(youngest)
        return True

    def _make_way(self, response: ResponseState) -> None:
        """Preempts: memory has run out."""
        if self._counters.kv_utilisation is None:
            self._counters.kv_utilisation = self._memory.utilisation()
        self._queue.preempt(response)
