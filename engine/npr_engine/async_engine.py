"""The engine as a service: requests come and go at any time, tokens stream out.

event loops ──► generate_async ──► inbox ──► one thread: Engine.step, step, step, ... ──► outputs ──► event loops
                    abort, run ────┘        (the only one that touches the engine)

The thread never waits for a consumer: what a request may bring is bounded by its budget, and how many
requests are in flight by `max_in_flight`; beyond that a request is turned away.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias, TypeVar

import torch

from npr_engine.engine import Engine, StepOutput, old_objects_left_alone
from npr_engine.language.token_ids import TokenIds
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.branching import error
from npr_engine.scheduler.response_state import Request
from npr_engine.scheduler.streaming import TokenEvent
from npr_ext.errors import UserError


class OverloadedError(UserError):
    """As many requests are in flight as the engine takes: try again later (HTTP 429)."""


class ClosedError(UserError):
    """The engine has been closed (HTTP 503)."""


Item: TypeAlias = TokenEvent | Rollout | ClosedError
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """A request in flight, and where its tokens go."""

    request: Request
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item]


@dataclass(frozen=True)
class _Submit:
    ticket: Ticket


@dataclass(frozen=True)
class _Abort:
    ticket: Ticket


@dataclass(frozen=True)
class _Stop:
    pass


_Message: TypeAlias = _Submit | _Abort | _Stop | Callable[[], None]


class AsyncEngine:
    """Owns an Engine, which nobody else may use until `close`."""

    def __init__(self, engine: Engine, max_in_flight: int = 1024) -> None:
        if max_in_flight < 1:
            raise UserError(f"engine: max_in_flight is {max_in_flight}, it must be >= 1")
        self._engine = engine
        self.max_in_flight = max_in_flight
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._lock = threading.Lock()  # of _tickets and _closed
        self._closed = False
        # A thread takes up torch's number of threads when it starts; this one decodes with its maker's.
        self._thread = threading.Thread(
            target=self._serve, args=(torch.get_num_threads(),), name="npr-engine", daemon=True
        )
        self._thread.start()

    @property
    def num_in_flight(self) -> int:
        return len(self._tickets)

    @property
    def is_open(self) -> bool:
        """False after `close`, and after a fault that has ended the thread."""
        return not self._closed and self._thread.is_alive()

    def generate_async(
        self, prompt: TokenIds, sampling: SamplingParams, request_id: str
    ) -> AsyncGenerator[TokenEvent | Rollout]:
        """Tokens as they come to be, and at the end the whole Rollout.

        The request is queued at once. Leaving the iterator early (cancelled, closed) aborts it. A failure of
        the model ends it with a Rollout of reason "error(...)".

        Raises:
            UserError: a request that is malformed, can never fit, or whose id is in flight already.
            OverloadedError, ClosedError: turned away.
        """
        request = self._engine.request(prompt, sampling, request_id)
        ticket = Ticket(request, asyncio.get_running_loop(), asyncio.Queue())
        with self._lock:
            self._need_open()
            if request_id in self._tickets:
                raise UserError(f"request id {request_id!r} is in flight already: ids name requests")
            if len(self._tickets) >= self.max_in_flight:
                raise OverloadedError(f"{self.max_in_flight} requests are in flight: try again later")
            self._tickets[request_id] = ticket
            self._inbox.put(_Submit(ticket))
        return self._items(ticket)

    def abort(self, request_id: str) -> None:
        """Ends a request with what it has; its iterator yields the Rollout, reason "aborted". Unknown ids are
        ignored: it may have ended just now."""
        with self._lock:
            ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._inbox.put(_Abort(ticket))

    async def run(self, work: Callable[[Engine], Result]) -> Result:
        """Runs `work` on the engine between two steps: new weights, statistics, memory."""
        done: Future[Result] = Future()

        def deliver() -> None:
            try:
                done.set_result(work(self._engine))
            except BaseException as caught:  # it is the caller's to handle, not the loop's
                done.set_exception(caught)

        with self._lock:
            self._need_open()
            self._inbox.put(deliver)
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Aborts what is in flight and ends the thread; its tokens so far arrive before. The engine is usable again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(_Stop())
        self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _need_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")

    async def _items(self, ticket: Ticket) -> AsyncGenerator[TokenEvent | Rollout]:
        ended = False
        try:
            while not ended:
                item = await ticket.items.get()
                ended = not isinstance(item, TokenEvent)
                if isinstance(item, ClosedError):
                    raise item
                yield item
        finally:
            if not ended:
                self._inbox.put(_Abort(ticket))

    def _serve(self, num_threads: int) -> None:
        """The thread: messages between steps, steps as long as there is work."""
        torch.set_num_threads(num_threads)
        try:
            with old_objects_left_alone():
                while self._take_messages():
                    if self._can_step:
                        self._deliver(self._step())
        except BaseException as caught:  # a fault of our own: nobody may wait for ever
            logger.exception("the engine stopped")
            self._break_down(ClosedError(f"the engine stopped: {type(caught).__name__}: {caught}"))

    def _break_down(self, cause: ClosedError) -> None:
        with self._lock:
            self._closed = True
            tickets = list(self._tickets.values())
            self._tickets.clear()
        for ticket in tickets:
            _send(ticket.loop, [(ticket, cause)])
        while not self._inbox.empty():
            message = self._inbox.get()
            if callable(message):
                message()

    @property
    def _can_step(self) -> bool:
        return self._engine.num_unfinished > 0 and self._engine.has_memory

    def _take_messages(self) -> bool:
        """Everything in the inbox, waiting where nothing else is to do; False at the end."""
        while True:
            try:
                message = self._inbox.get(block=not self._can_step)
            except queue.Empty:
                return True
            match message:
                case _Submit(ticket):
                    self._engine.submit(ticket.request)
                case _Abort(ticket):
                    name = ticket.request.request_id
                    # Its id may have ended and come again since.
                    if self._tickets.get(name) is ticket and self._engine.abort(name):
                        self._deliver(self._engine.take_output())
                case _Stop():
                    for request_id in list(self._tickets):
                        self._engine.abort(request_id)
                    self._deliver(self._engine.take_output())
                    return False
                case work:
                    work()

    def _step(self) -> StepOutput:
        try:
            return self._engine.step()
        except Exception as caught:  # whatever the model did: these requests end, later ones are served
            logger.exception("a step of the engine failed; %d requests end", self._engine.num_unfinished)
            self._engine.fail_all(error(f"{type(caught).__name__}: {caught}"))
            return self._engine.take_output()

    def _deliver(self, output: StepOutput) -> None:
        """Hands tokens and rollouts over, one call into each event loop."""
        items: list[TokenEvent | Rollout] = [*output.events, *output.rollouts]
        found: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Item]]] = {}
        with self._lock:
            for item in items:
                ticket = self._tickets[item.request_id]
                found.setdefault(ticket.loop, []).append((ticket, item))
            for rollout in output.rollouts:
                del self._tickets[rollout.request_id]
        for loop, theirs in found.items():
            if not _send(loop, theirs):  # nobody is left to read them
                for ticket, _ in theirs:
                    self._inbox.put(_Abort(ticket))


def _send(loop: asyncio.AbstractEventLoop, items: list[tuple[Ticket, Item]]) -> bool:
    """Whether the loop still takes them."""

    def put() -> None:
        for ticket, item in items:
            ticket.items.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop is closed
        return False
    return True
