"""The scheduler: decides what every engine step computes. No tensors, no model.

    submit ─► waiting ─► running ─► plan() ─► Batch ─► (runner) ─► Sampled ─► commit() ─► finished
                 ▲          │          │                                        │
                 └─ preempt ┘          └ prompts, forced tokens,                └ fork at </guideline>, join after
                   (recompute)           one row a branch                         the last </step>, budgets

First come, first served: the oldest response is never preempted, so everything ends. A preempted response keeps
its tokens; when it is admitted again, `ResponseState.all_work` computes their KV through the same forks and joins.
"""

from __future__ import annotations

from npr_engine.kvcache.block_pool import BlockPool, slots_needed
from npr_engine.language.constraint import Constraint
from npr_engine.language.grammar import Grammar
from npr_engine.scheduler.batch import Batch, Sampled, SampleInputs
from npr_engine.scheduler.draws import Draws
from npr_engine.scheduler.limits import Counters, Limits
from npr_engine.scheduler.memory import Memory
from npr_engine.scheduler.request_slots import RequestSlots
from npr_engine.scheduler.response_queue import Finished, ResponseQueue
from npr_engine.scheduler.response_state import Branch, Request, ResponseState
from npr_engine.scheduler.rows import Rows
from npr_engine.scheduler.step_commit import StepCommit
from npr_engine.scheduler.step_planner import StepPlanner
from npr_engine.scheduler.streaming import TokenEvent, last_events, new_events
from npr_ext.errors import UserError


class Scheduler:
    """Requests in, batches out, finished responses out. plan() and commit() alternate."""

    def __init__(self, grammar: Grammar, limits: Limits, num_token_ids: int) -> None:
        self.limits = limits
        self.counters = counters = Counters()
        self.constraint = Constraint(grammar.vocabulary, num_token_ids)
        self._grammar = grammar
        self._rows = rows = Rows(width=64, capacity=64)
        self._slots = slots = RequestSlots(limits.max_running_requests)
        self._memory = memory = Memory(BlockPool(limits.num_blocks, limits.block_size), rows)
        self._queue = queue = ResponseQueue(limits, counters, rows, slots, memory)
        self._draws = Draws(rows, slots, self.constraint)
        self._planner = StepPlanner(limits, counters, rows, memory, queue)
        self._commit = StepCommit(grammar, self.constraint, counters, rows, slots, memory, queue)
        # Branches that the last step has sampled, to stream.
        self._sampled: list[tuple[ResponseState, Branch]] = []
        self._events: list[TokenEvent] = []

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._queue.running)

    @property
    def num_free_blocks(self) -> int:
        return self._memory.pool.num_free

    def check(self, request: Request) -> None:
        """UserError where the request could never fit. Reads sizes alone, so any thread may ask."""
        params, prompt = request.params, request.prompt_ids
        if len(prompt) == 0:
            raise UserError(f"request {request.request_id}: the prompt is empty; give it at least one token")
        if params.branching and params.max_branches >= self.limits.max_batch_tokens:
            raise UserError(
                f"request {request.request_id}: {params.max_branches} branches decode in one step, which takes"
                f" {self.limits.max_batch_tokens} tokens: raise max_batch_tokens or lower max_branches"
            )
        pool = self._memory.pool
        need = slots_needed(len(prompt), params.max_tokens, pool.block_size)
        if need > pool.num_slots:
            raise UserError(
                f"request {request.request_id}: a prompt of {len(prompt)} and max_tokens {params.max_tokens} need"
                f" {need} KV slots, the engine has {pool.num_slots}:"
                " raise num_kv_slots or lower max_tokens"
            )

    def room_behind(self, prompt_tokens: int) -> int:
        """The largest max_tokens that ever fits behind a prompt of so many tokens; below 1 where none does.
        Reads sizes alone, so any thread may ask."""
        return self._memory.pool.room_behind(prompt_tokens)

    def submit(self, request: Request) -> None:
        """Queues a request; UserError where it could never fit."""
        self.check(request)
        self._queue.add(request, self._grammar)

    def abort(self, request_id: str) -> bool:
        """Ends a request with what it has; False where it is unknown. Not between plan() and commit()."""
        response = self._queue.find(request_id)
        if response is not None:
            self._end(response, "aborted")
        return response is not None

    def fail_all(self, reason: str) -> None:
        """After a step that failed: everything ends with what it has, no KV is trusted."""
        self.restart_all()
        for response in list(self._queue.waiting):
            self._end(response, reason)

    def take_events(self) -> list[TokenEvent]:
        """The tokens of the last commit, and those of responses that have ended since then and are not streamed yet."""
        events = [*self._events, *new_events(self._rows, self._sampled)]
        self._events, self._sampled = [], []
        return events

    def take_finished(self) -> list[Finished]:
        """What has ended since the last call."""
        return self._queue.take_finished()

    def plan(self) -> Batch | None:
        """The next engine step, or None when nothing is left to do."""
        return self._planner.plan()

    def sample_inputs(self, batch: Batch) -> SampleInputs:
        """How to sample after the batch that was just planned."""
        return self._draws.inputs(batch.sample_rows)

    def commit(self, batch: Batch, sampled: Sampled, *, stream: bool = False) -> None:
        """Takes what the planned engine step has sampled: new tokens, forks, joins, ends. `stream` keeps in
        mind which branches have grown, for take_events()."""
        self._memory.release_retired()
        if stream:
            rows = batch.sample_rows.tolist()
            self._sampled = [(self._queue.owner(row), self._memory.branch_at[row]) for row in rows]
        self._commit.commit(batch, sampled)

    def restart_all(self) -> None:
        """All KV is void (other weights, or a step that failed): every running response starts over from its tokens."""
        self._memory.release_retired()
        for response in reversed(list(self._queue.running)):
            self._queue.preempt(response)
        self._planner.drop_prompts()
        self._memory.prompts.clear()

    def begin_anew(self) -> None:
        """Nothing waits or runs: what comes next finds no cached prompt, and gets the rows, slots and blocks that a new
        scheduler would give it. Where a row stands in a batch, and what stands beside it, decides the last bits of its
        log-probs: they would depend on what was decoded before, and on a restart."""
        assert not self.num_unfinished
        self.restart_all()
        for pool in (self._rows, self._slots, self._memory.pool):
            pool.restore_order()

    def check_integrity(self) -> None:
        """Asserts that no block, KV slot, row or request slot is lost or owned twice. Not between plan() and
        commit()."""
        self._memory.check_integrity(self._queue.running)
        self._queue.check_integrity()

    def _end(self, response: ResponseState, reason: str) -> None:
        """Ends a response from outside of a commit."""
        self._queue.finish(response, reason)
        self._events += last_events(self._rows, response)
