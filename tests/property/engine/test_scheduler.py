"""The scheduler core under random use: no KV is lost or shared by mistake, and no use changes what is decoded.

In place of a model stands a pure function of what a token sees (the tokens and positions behind its table
row), so a wrong slot, position or recomputation anywhere changes the output.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, defaultdict

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.batch import Batch, Sampled
from npr_engine.scheduler.limits import Limits
from npr_engine.scheduler.response_queue import Finished
from npr_engine.scheduler.response_state import Request
from npr_engine.scheduler.scheduler import Scheduler
from npr_engine.testing import EOS, GRAMMAR, PIECES, encode

GUIDELINE, GUIDELINE_END, PLAN, PLAN_END, STEP, STEP_END, TAKEAWAY, TAKEAWAY_END = range(2, 10)
PROMPTS = [encode(text) for text in ("a", "ab", "abcdefgh", "abcdefgh12345678+", "<plan>a</plan>")]


def next_token(seen: list[int], draw: random.Random) -> int:
    """A token that mostly keeps to the language, given all that the last token sees."""
    if draw.random() < 0.004:
        return draw.randrange(len(PIECES))
    opened = next((token for token in reversed(seen) if GUIDELINE <= token <= TAKEAWAY_END), TAKEAWAY_END)
    if opened == PLAN:
        start = len(seen) - seen[::-1].index(PLAN)
        guideline = len(seen) - 1 - seen[::-1].index(GUIDELINE) if GUIDELINE in seen else 0
        number = encode(f"{seen[guideline:].count(PLAN)}:")
        if len(seen) - start < len(number):
            return number[len(seen) - start]
        if len(seen) - start == len(number):
            return draw.choice(encode("abc"))
        return draw.choice([*encode("abc"), PLAN_END])
    if opened in (GUIDELINE, PLAN_END):
        return draw.choice([PLAN, GUIDELINE_END]) if opened == PLAN_END else PLAN
    if opened == TAKEAWAY_END:
        return draw.choice([*encode("ab\nc"), GUIDELINE, GUIDELINE, GUIDELINE, EOS])
    return draw.choice([*encode("abcdefgh"), STEP_END if opened == STEP else TAKEAWAY_END])


class ContextModel:
    """A model whose KV of a token is the token and its position. It obeys the masks of constrained sampling, and has
    no distribution after some contexts."""

    def __init__(self, num_slots: int) -> None:
        self.kv = np.full((num_slots, 2), -1, np.int64)

    def step(self, scheduler: Scheduler, batch: Batch) -> None:
        """Runs the planned batch and commits it."""
        inputs = scheduler.sample_inputs(batch)
        scheduler.commit(batch, self.run(batch, scheduler.constraint.forbidden[inputs.masks]), stream=True)

    def run(self, batch: Batch, forbidden: NDArray[np.bool_]) -> Sampled:
        assert len(set(batch.slots.tolist())) == batch.num_tokens, "two tokens write one slot"
        self.kv[batch.slots] = np.stack((batch.token_ids, batch.positions), 1)
        drawn, invalid = [], []
        for index, barred in zip(batch.sample_index.tolist(), forbidden, strict=True):
            slots = batch.block_tables[batch.rows[index], : batch.lengths[index]]
            assert slots[-1] == batch.slots[index]
            context = self.kv[slots]
            assert (context >= 0).all(), "a token sees a slot that nobody has written"
            draw = random.Random(zlib.crc32(context.tobytes()))
            token = next_token(context[:, 0].tolist(), draw)
            drawn.append(draw.choice(np.flatnonzero(~barred).tolist()) if barred[token] else token)
            invalid.append(draw.random() < 0.002)
        zeros = np.zeros(len(drawn), np.float32)
        return Sampled(np.array(drawn, np.int32), zeros, zeros, np.array(invalid, np.bool_))


def decode_alone(request: Request) -> Finished:
    """What a request gives in an engine of its own."""
    scheduler = Scheduler(GRAMMAR, Limits(4096, 1, 4096, 1), len(PIECES))
    model = ContextModel(4096)
    scheduler.submit(request)
    while (batch := scheduler.plan()) is not None:
        model.step(scheduler, batch)
    (finished,) = scheduler.take_finished()
    return finished


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, step (with forks and joins), abort, preempt, evict, new weights and failing steps in any order, with
    memory for a few responses."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = Limits(num_blocks=48, block_size=4, max_batch_tokens=12, max_running_requests=6)
        self.scheduler = Scheduler(GRAMMAR, self.limits, len(PIECES))
        self.model = ContextModel(self.limits.num_blocks * self.limits.block_size)
        self.num_submitted = 0
        self.submitted: dict[str, Request] = {}
        self.finished: dict[str, Finished] = {}
        self.streamed: defaultdict[str, list[int]] = defaultdict(list)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        max_tokens=st.integers(1, 150),
        path=st.one_of(st.none(), st.integers(1, 100)),
        max_branches=st.integers(1, 8),
        kind=st.sampled_from(["free", "free", "constrained", "plain"]),
        stops=st.sampled_from([(), (), (STEP_END,), tuple(encode("gh"))]),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        path: int | None,
        max_branches: int,
        kind: str,
        stops: tuple[int, ...],
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            max_critical_path=path,
            max_branches=max_branches,
            branching=kind != "plain",
            constrain=kind == "constrained",
            stop_token_ids=stops,
        )
        request = Request(str(self.num_submitted), np.array(prompt, np.int32), params)
        self.num_submitted += 1
        self.submitted[request.request_id] = request
        self.scheduler.submit(request)

    @rule(steps=st.integers(1, 30))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = self.scheduler.plan()
            if batch is None:
                return
            assert batch.num_tokens <= self.limits.max_batch_tokens
            self.model.step(self.scheduler, batch)
            self.scheduler.check_integrity()
            self._hear()

    @rule()
    def fail_in_a_step(self) -> None:
        self.scheduler.plan()
        self.scheduler.restart_all()

    @rule(count=st.integers(1, 3))
    def preempt(self, count: int) -> None:
        """The youngest give way, as if an older one had asked for memory."""
        for response in reversed(self.scheduler._queue.running[-count:]):
            self.scheduler._planner._make_way(response)

    @rule(count=st.integers(1, 3))
    def evict(self, count: int) -> None:
        """Prompts that nobody uses are forgotten, as if somebody had asked for memory."""
        for _ in range(count):
            self.scheduler._memory.prompts.evict(self.scheduler.counters.steps)

    @rule()
    def new_weights(self) -> None:
        self.scheduler.restart_all()
        assert self.scheduler.num_free_blocks == self.limits.num_blocks
        self.model.kv[:] = -1

    @rule(index=st.integers(0, 30))
    def abort(self, index: int) -> None:
        if self.scheduler.abort(str(index)):
            self.submitted.pop(str(index))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.scheduler.check_integrity()
        self._collect()

    def teardown(self) -> None:
        """Everything ends, without a block lost, and as if it had been alone."""
        self.run(100_000)
        self._collect()
        assert self.scheduler.num_unfinished == 0
        self.scheduler.restart_all()
        assert self.scheduler.num_free_blocks == self.limits.num_blocks
        for request_id, request in self.submitted.items():
            ended, alone = self.finished[request_id], decode_alone(request)
            assert ended.reason == alone.reason
            for name in ("tokens", "positions", "forced"):
                assert getattr(ended.record, name).tolist() == getattr(alone.record, name).tolist()
            assert len(ended.record) <= request.params.max_tokens
            assert sorted(self.streamed[request_id]) == sorted(ended.record.tokens.tolist())
            if request.params.constrain:
                assert not ended.reason.startswith("malformed")
                assert ended.reason != "eos" or GRAMMAR.read(ended.record.tokens).defect is None
            assert (np.diff(ended.record.steps[ended.branch_ids == 0]) >= 0).all()

    def _hear(self) -> None:
        for event in self.scheduler.take_events():
            self.streamed[event.request_id] += event.token_ids.tolist()

    def _collect(self) -> None:
        self._hear()
        for ended in self.scheduler.take_finished():
            assert ended.request.request_id not in self.finished
            self.finished[ended.request.request_id] = ended


SchedulerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestTheSchedulerUnderAnyUse = SchedulerMachine.TestCase


def test_the_stand_in_reaches_every_part_of_the_language() -> None:
    reasons: Counter[str] = Counter()
    forks = 0
    for index in range(90):
        prompt = np.array([*PROMPTS[3], 10 + index % 20, 10 + index // 20], np.int32)
        stops = tuple(encode("9")) if index % 3 == 0 else ()
        params = SamplingParams(max_tokens=130, constrain=index >= 60, stop_token_ids=stops)
        ended = decode_alone(Request(str(index), prompt, params))
        reasons[ended.reason.partition("(")[0]] += 1
        forks += bool(ended.branch_ids.max(initial=0) > 1)
    assert min(reasons["eos"], reasons["length"], reasons["malformed"], forks) >= 2, (reasons, forks)
    assert reasons["error"] >= 2, reasons
