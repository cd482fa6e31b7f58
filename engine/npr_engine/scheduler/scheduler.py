"""The scheduler core: decides what every engine step computes. No tensors, no model.

    submit ─► waiting ─► running ──► plan() ─► Batch ─► (runner) ─► Sampled ─► commit() ─► finished
                 ▲          │          │                                         │
                 └─ preempt ┘          └ feed prompts, forced tokens, decode     └ fork at </guideline>,
                 join after
                   (recompute)           one row per branch                        the last </step>, budgets

First come, first served: the oldest response is never preempted, so everything ends. A preempted response
keeps its tokens; when it is admitted again, `ResponseState.all_work` feeds them through the same forks and
joins.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npr_engine.kvcache.block_pool import BlockPool, slots_needed
from npr_engine.kvcache.prompt_cache import PromptKV
from npr_engine.language.constraint import Constraint, Phase
from npr_engine.language.grammar import Grammar
from npr_engine.language.parser import QUIET_TAGS
from npr_engine.language.vocabulary import TokenClass
from npr_engine.scheduler.batch import Batch, Sampled, SampleInputs
from npr_engine.scheduler.branching import Branching, error
from npr_engine.scheduler.draws import Draws
from npr_engine.scheduler.memory import Memory
from npr_engine.scheduler.response_state import (
    Branch,
    Feed,
    Join,
    Open,
    Record,
    Request,
    ResponseState,
    Resume,
)
from npr_engine.scheduler.rows import Rows, Seats
from npr_engine.scheduler.step_plan import StepPlan
from npr_engine.scheduler.streaming import TokenEvent, last_events, new_events
from npr_ext.errors import UserError

NO_DISTRIBUTION = error("the model's logits are NaN or infinite")


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine: KV blocks and their size, tokens a step may feed, responses that may run at
    once."""

    num_blocks: int
    block_size: int
    max_batch_tokens: int
    max_running_requests: int


@dataclass(frozen=True)
class Finished:
    """A response that has ended, in packed order: its record and branch ids int32 [R]."""

    request: Request
    reason: str
    record: Record
    branch_ids: NDArray[np.int32]


@dataclass
class Counters:
    """What has happened so far. `kv_utilisation`: slots with a live token / all slots, counted from the tables when
    memory ran out for the first time; None before."""

    steps: int = 0
    sampled_tokens: int = 0
    fed_tokens: int = 0
    forced_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    forks: int = 0
    joins: int = 0
    peak_blocks: int = 0
    kv_utilisation: float | None = None


class Scheduler:
    """Requests in, batches out, finished responses out. plan() and commit() alternate."""

    def __init__(self, grammar: Grammar, limits: Limits, num_token_ids: int) -> None:
        self.limits = limits
        self.counters = Counters()
        self.step = 0
        self._grammar = grammar
        self._classes = grammar.vocabulary.padded_classes(num_token_ids)
        self.constraint = Constraint(grammar.vocabulary, num_token_ids)
        self._rows = Rows(width=64, capacity=64)
        self._seats = Seats(limits.max_running_requests)
        self._memory = Memory(BlockPool(limits.num_blocks, limits.block_size), self._rows)
        self._draws = Draws(self._rows, self._seats, self.constraint)
        self._branching = Branching(grammar, self._rows, self._seats)
        self._waiting: deque[ResponseState] = deque()
        self._running: list[ResponseState] = []  # in order of arrival
        self._filling: list[PromptKV] = []
        self._at_seat: list[ResponseState | None] = [None] * limits.max_running_requests
        self._finished: list[Finished] = []
        self._sampled: list[tuple[ResponseState, Branch]] = []
        self._events: list[TokenEvent] = []
        self._arrivals = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

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
        """See `BlockPool.room_behind`. Reads sizes alone, so any thread may ask."""
        return self._memory.pool.room_behind(prompt_tokens)

    def submit(self, request: Request) -> None:
        """Queues a request; UserError where it could never fit."""
        self.check(request)
        params, prompt = request.params, request.prompt_ids
        self._rows.need_width(len(prompt) + params.max_tokens + 1)
        record = Record.given(prompt[-1:].tolist(), len(prompt) - 1, -1)
        trunk = Branch(0, request.key, record=record, told=1)
        state = ResponseState(request, self._arrivals, self._grammar.parser(), trunk, params.max_tokens)
        self._arrivals += 1
        self._waiting.append(state)

    def abort(self, request_id: str) -> bool:
        """Ends a request with what it has; False where it is unknown. Not between plan() and commit()."""
        for response in (*self._running, *self._waiting):
            if response.request.request_id == request_id:
                self._finish(response, "aborted")
                self._events += last_events(self._rows, response)
                return True
        return False

    def fail_all(self, reason: str) -> None:
        """After a step that failed: everything ends with what it has, no KV is trusted."""
        self.restart_all()
        for response in list(self._waiting):
            self._finish(response, reason)
            self._events += last_events(self._rows, response)

    def take_events(self) -> list[TokenEvent]:
        """The tokens of the last commit, and those that the ends since then have left untold."""
        events = [*self._events, *new_events(self._rows, self._sampled)]
        self._events, self._sampled = [], []
        return events

    def take_finished(self) -> list[Finished]:
        """What has ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def plan(self) -> Batch | None:
        """The next step, or None when nothing is left to do."""
        self._admit()
        self._reserve_decoding()
        plan = StepPlan(self._rows, 0)
        self._do_all_work(plan)
        room = self.limits.max_batch_tokens - plan.num_chunk_tokens
        decoding = self._first_come(np.flatnonzero(self._rows.decoding), room)
        if len(decoding) + plan.num_chunk_tokens == 0:
            assert self.num_unfinished == 0, "the scheduler is stuck"
            return None
        counters, pool = self.counters, self._memory.pool
        counters.fed_tokens += len(decoding) + plan.num_chunk_tokens
        counters.peak_blocks = max(counters.peak_blocks, pool.num_blocks - pool.num_free)
        return plan.build(decoding)

    def sample_inputs(self, batch: Batch) -> SampleInputs:
        """How to sample after the batch that was just planned."""
        return self._draws.inputs(batch.sample_rows)

    def commit(self, batch: Batch, sampled: Sampled, *, stream: bool = False) -> None:
        """Takes what the planned step has sampled: new tokens, forks, joins, ends. `stream` keeps in mind which
        branches have grown, for take_events()."""
        self._memory.release_retired()
        rows, seats = self._rows, self._seats
        row, token = batch.sample_rows, sampled.token_ids
        logprobs, sampler_logprobs = sampled.logprobs, sampled.sampler_logprobs
        rows.decoding[row] = True
        if stream:
            self._sampled = [(self._owner(place), self._memory.branch_at[place]) for place in row.tolist()]
        if sampled.invalid.any():
            valid = self._end_invalid(row, sampled.invalid)
            row, token, logprobs = row[valid], token[valid], logprobs[valid]
            sampler_logprobs = sampler_logprobs[valid]
        seat = rows.seat[row]
        counts = np.bincount(seat, minlength=self.limits.max_running_requests)
        seats.tokens_left -= counts
        accepted = self._within_budget(row, seat, counts)
        if accepted is not None:
            row, seat, token = row[accepted], seat[accepted], token[accepted]
            logprobs, sampler_logprobs = logprobs[accepted], sampler_logprobs[accepted]
        known, position = rows.known[row], rows.position[row]
        if len(row):
            rows.need_capacity(int(known.max()) + 1)
        rows.tokens[row, known], rows.forced[row, known] = token, False
        rows.logprobs[row, known], rows.sampler_logprobs[row, known] = logprobs, sampler_logprobs
        rows.steps[row, known], rows.positions[row, known] = self.step, position
        rows.known[row] = known + 1
        self.counters.sampled_tokens += len(row)
        self._advance_phases(row, seat, token)
        self._end_stopped(seat, token)
        self._structural_tokens(row, seat, token)
        self._end_by_length(row, seat, position, counts)
        self.step += 1
        self.counters.steps += 1

    def restart_all(self) -> None:
        """All KV is void (other weights, or a step that failed): every running response starts over from
        its tokens."""
        self._memory.release_retired()
        for response in reversed(list(self._running)):
            self._preempt(response)
        for prompt in self._filling:
            self._rows.release([prompt.row])
            prompt.row = -1
        self._filling = []
        self._memory.prompts.clear()

    def check_integrity(self) -> None:
        """Asserts that no block, slot, row or seat is lost or owned twice. Not between plan() and
        commit()."""
        self._memory.check_integrity(self._running)
        taken = [response.seat for response in self._running]
        assert (
            len(set(taken)) == len(taken)
            and self._seats.num_free + len(taken) == self.limits.max_running_requests
        )
        assert all(self._at_seat[response.seat] is response for response in self._running)
        arrivals = [response.arrival for response in (*self._running, *self._waiting)]
        assert arrivals == sorted(arrivals), "service is out of order"
        assert all(self._seats.tokens_left[seat] >= 0 for seat in taken)

    def _admit(self) -> None:
        """First come, first served: as long as the next one's tokens fit beside a block for each that
        runs."""
        while self._waiting and self._seats.num_free:
            response = self._waiting[0]
            headroom = min(len(self._running), self.limits.num_blocks // 16)
            if not self._memory.fits(response, headroom, self.step):
                return
            self._waiting.popleft()
            params, prompt_length = response.request.params, len(response.request.prompt_ids)
            last_position = prompt_length + (params.max_critical_path or params.max_tokens) - 1
            response.seat = self._seats.take(params, response.tokens_left, last_position)
            self._at_seat[response.seat] = response
            self._running.append(response)
            self._memory.admit(response, self.step)
            response.work = response.all_work()
            self._start_filling(response)

    def _start_filling(self, response: ResponseState) -> None:
        prompt, rows = response.prompt, self._rows
        assert prompt is not None
        if prompt.ready or prompt.row >= 0:
            return
        length = len(prompt.token_ids)
        prompt.row = rows.allocate(seat=-1, key=0, position=0)
        rows.need_capacity(length)
        rows.tokens[prompt.row, :length], rows.known[prompt.row] = prompt.token_ids, length
        rows.table[prompt.row, :length], rows.reserved[prompt.row] = prompt.slots, length
        self._filling.append(prompt)

    def _do_all_work(self, plan: StepPlan) -> None:
        """Chunks of prompts, of recomputation and of forced text, oldest response first. What it plans leaves room for
        the decoding of older responses only: the oldest always gets on, and where all do not fit, the youngest wait.
        """
        limit, running = self.limits.max_batch_tokens, list(self._running)
        seats = self._rows.seat[np.flatnonzero(self._rows.decoding)]
        if any([response.work for response in running]):  # noqa: C419 (a generator takes twice as long)
            decoding = np.bincount(seats, minlength=self.limits.max_running_requests)
            taken = np.cumsum(decoding[[response.seat for response in running]]).tolist()
            for response, older in zip(running, taken, strict=True):
                plan.room = limit - older - plan.num_chunk_tokens
                if response.work and response.seat >= 0 and plan.room > 0:
                    assert response.prompt is not None
                    self._fill(response.prompt, plan)
                    self._do_work(response, plan)
        plan.room = limit - len(seats) - plan.num_chunk_tokens
        for prompt in list(self._filling):  # those whose users are gone
            self._fill(prompt, plan)

    def _fill(self, prompt: PromptKV, plan: StepPlan) -> None:
        """The next chunk of a prompt whose KV is not complete."""
        count = min(len(prompt.token_ids) - prompt.fed, plan.room)
        if prompt.ready or count <= 0:
            return
        plan.add(prompt.row, count)
        prompt.fed += count
        prompt.planned_step = self.step
        if prompt.ready:
            self._memory.retired.append(prompt.row)
            prompt.row = -1
            self._filling.remove(prompt)

    def _reserve_decoding(self) -> None:
        """A slot for the next token of every branch; the youngest response gives way where there is none."""
        rows = self._rows
        decoding = np.flatnonzero(rows.decoding)
        rows.promised[decoding] = 1
        full = decoding[rows.length[decoding] == rows.reserved[decoding]]
        if len(full) == 0:
            return
        short = self._memory.extend(full, [self._owner(row) for row in full.tolist()])
        for row in self._by_arrival(short).tolist():
            if not rows.decoding[row]:
                continue  # preempted for an older one
            response = self._owner(row)
            if not self._reserve(response, row, 1):
                self._make_way(response)

    def _do_work(self, response: ResponseState, plan: StepPlan) -> None:
        """As much of the response's work as fits into this step, in order."""
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
                    self.counters.forks += 1
                case Join(fork):
                    self._memory.join(response, fork)
                    self.counters.joins += 1
            response.work.popleft()

    def _feed(self, response: ResponseState, feed: Feed, plan: StepPlan) -> bool:
        """Plans the next chunk; False where the rest has to wait."""
        row = feed.branch.row
        until = int(self._rows.known[row]) if feed.until is None else feed.until
        pending = until - int(self._rows.fed[row])
        count = min(pending, plan.room)
        if pending and (count == 0 or not self._reserve(response, row, count)):
            return False
        if count:
            plan.add(row, count)
        return count == pending

    def _resume(self, response: ResponseState, branches: tuple[Branch, ...], plan: StepPlan) -> bool:
        """Plans all that is pending of the branches, sampled after, if it fits; else what fits without
        their last tokens, which wait for each other."""
        rows = [branch.row for branch in branches]
        pending = [int(self._rows.known[row] - self._rows.fed[row]) for row in rows]
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

    def _reserve(self, response: ResponseState, row: int, count: int) -> bool:
        """Slots for a row, at the cost of younger responses; False where older ones hold them."""
        while not self._memory.reserve(response, row, count, self.step):
            youngest = self._running[-1]
            if youngest is response:
                return False
            self._make_way(youngest)
        return True

    def _make_way(self, response: ResponseState) -> None:
        """Memory has run out."""
        if self.counters.kv_utilisation is None:
            self.counters.kv_utilisation = self._memory.utilisation()
        self._preempt(response)

    def _preempt(self, response: ResponseState) -> None:
        """Back to the queue, before all that came later; its tokens stay, its KV is recomputed."""
        self.counters.preemptions += 1
        on_rows = [branch.row for branch in response.branches_on_rows()]
        self.counters.recomputed_tokens += int(self._rows.fed[on_rows].sum())
        self._leave(response)
        self._waiting.appendleft(response)

    def _finish(self, response: ResponseState, reason: str) -> None:
        if response.seat >= 0:
            self._leave(response)
        else:
            self._waiting.remove(response)
        record, branch_ids = response.packed()
        self.counters.forced_tokens += int(record.forced.sum())
        self._finished.append(Finished(response.request, reason, record, branch_ids))

    def _leave(self, response: ResponseState) -> None:
        response.tokens_left = int(self._seats.tokens_left[response.seat])
        self._memory.evacuate(response)
        self._running.remove(response)
        self._at_seat[response.seat] = None
        self._seats.leave(response.seat)
        response.seat = -1

    def _within_budget(
        self, row: NDArray[np.int32], seat: NDArray[np.int32], counts: NDArray[np.int64]
    ) -> NDArray[np.bool_] | None:
        """Which sampled tokens max_tokens still allows, the first ones in packed order; None: all of them."""
        left = self._seats.tokens_left
        over = np.flatnonzero(left < 0)
        if len(over) == 0:
            return None
        accepted = np.ones(len(row), np.bool_)
        for place in over.tolist():
            response = self._at_seat[place]
            assert response is not None
            allowed = int(counts[place] + left[place])
            mine = set(row[seat == place].tolist())
            order = [branch.row for branch in response.branches_on_rows() if branch.row in mine]
            accepted[np.isin(row, order[allowed:])] = False
            left[place] = 0
        return accepted

    def _owner(self, row: int) -> ResponseState:
        response = self._at_seat[self._rows.seat[row]]
        assert response is not None
        return response

    def _end_invalid(self, row: NDArray[np.int32], invalid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Ends the responses of rows without a distribution; which rows are left. Nobody else has seen their KV but
        the users of their prompt: the last of them takes it along."""
        for place in np.unique(self._rows.seat[row[invalid]]).tolist():
            response = self._at_seat[place]
            assert response is not None
            self._finish(response, NO_DISTRIBUTION)
            self._memory.prompts.forget(response.prefix_ids, self.step)
        left: NDArray[np.bool_] = self._rows.seat[row] >= 0
        return left

    def _advance_phases(
        self, row: NDArray[np.int32], seat: NDArray[np.int32], token: NDArray[np.int32]
    ) -> None:
        """What the tokens of constrained responses mean for the next mask."""
        if self._seats.num_constrained == 0:
            return
        constrained = self._seats.constrained[seat]
        row, token = row[constrained], token[constrained]
        rows, states = self._rows, self._rows.state[row]
        rows.phase[row] = self.constraint.following(states, rows.phase[row], token)
        for place in row[self.constraint.may_answer(states, token)].tolist():
            answered = self._branching.has_answer(self._owner(place))
            rows.phase[place] = Phase.CLOSABLE if answered else Phase.BEGUN

    def _end_stopped(self, seat: NDArray[np.int32], token: NDArray[np.int32]) -> None:
        """Ends responses by their stop tokens."""
        if self._seats.stop_ids.shape[1] == 0:
            return
        stopped = (self._seats.stop_ids[seat] == token[:, None]).any(1)
        for place in np.unique(seat[stopped]).tolist():
            response = self._at_seat[place]
            assert response is not None
            self._finish(response, "stopped")

    def _structural_tokens(
        self, row: NDArray[np.int32], seat: NDArray[np.int32], token: NDArray[np.int32]
    ) -> None:
        """Forks, joins and ends by tags and EOS; other tags only move the state of their row."""
        classes = self._classes[token]
        structural = np.flatnonzero(classes >= TokenClass.EOS)
        following = QUIET_TAGS[self._rows.state[row[structural]], classes[structural]]
        quiet = following >= 0
        self._rows.state[row[structural[quiet]]] = following[quiet]
        numbered = (classes[structural] == TokenClass.PLAN) & self._seats.constrained[seat[structural]]
        for index in structural[~quiet | numbered].tolist():
            response = self._at_seat[seat[index]]
            if response is None:
                continue  # another of its branches, or a stop token, has just ended it
            if self._seats.constrained[seat[index]] and classes[index] == TokenClass.PLAN:
                reason = self._branching.number_plan(response, self.step)
            else:
                branch = self._memory.branch_at[int(row[index])]
                reason = self._branching.structural(response, branch, TokenClass(classes[index]), self.step)
            if reason is not None:
                self._finish(response, reason)

    def _end_by_length(
        self,
        row: NDArray[np.int32],
        seat: NDArray[np.int32],
        position: NDArray[np.int32],
        counts: NDArray[np.int64],
    ) -> None:
        """Ends responses that have used up max_tokens, or that would go on beyond their critical path."""
        at_end = (position >= self._seats.last_position[seat]) & self._rows.decoding[row]
        used_up = (counts > 0) & (self._seats.tokens_left <= 0)
        for place in {*seat[at_end].tolist(), *np.flatnonzero(used_up).tolist()}:
            response = self._at_seat[place]
            if response is not None:
                self._finish(response, "length")

    def _by_arrival(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, oldest response first, the rows of a response in order of their number."""
        order = {seat: place for place, seat in enumerate(response.seat for response in self._running)}
        places = [order[seat] for seat in self._rows.seat[rows].tolist()]
        return rows[np.argsort(places, kind="stable")] if len(rows) > 1 else rows

    def _first_come(self, decoding: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """The rows that decode in this step: all, or those of the oldest responses, whole responses only."""
        if len(decoding) <= room:
            return decoding
        ordered = self._by_arrival(decoding)
        seats = self._rows.seat[ordered]
        starts = np.flatnonzero(np.concatenate(([True], seats[1:] != seats[:-1])))
        return ordered[: starts[starts <= room].max()]
