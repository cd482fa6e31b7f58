"""From a request's prompts to the text of its choices.

prompts x n ──► submit ──► Job ──► decode (one choice) ──► TextDelta, TextDelta, ..., Ending
                            └──► abort, whatever has ended it
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from megatron_npr.server.http.errors import ApiError, from_user_error
from megatron_npr.server.metrics import Metrics, Stopwatch
from megatron_npr.server.schema import GenerationRequest
from megatron_npr.server.served_model import ServedModel
from megatron_npr.server.text.delta import TextDelta
from megatron_npr.server.text.transcript import Counts, Transcript
from npr_engine.async_engine import AsyncEngine
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.branching import is_error
from npr_engine.scheduler.streaming import TokenEvent
from npr_ext.errors import UserError

GREEDY_BELOW = 1e-3  # a smaller temperature overflows the logits that it divides
LEAST_TOP_P = 1e-6  # the best token alone

Item = TypeVar("Item")


@dataclass(frozen=True)
class Rules:
    """What a kind of request means where it says nothing, and what this server allows."""

    default_max_tokens: int
    max_tokens: int
    branching: bool
    constrain: bool
    context_length: int


@dataclass(frozen=True)
class Ending:
    """Why a choice has ended, in the engine's words, and its tokens."""

    reason: str
    counts: Counts

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words, which have none for a malformed response."""
        return "length" if self.reason in ("length", "budget") else "stop"


@dataclass(frozen=True)
class Choice:
    """A choice in flight."""

    stream: AsyncGenerator[TokenEvent | Rollout]
    transcript: Transcript
    watch: Stopwatch


@dataclass(frozen=True)
class Job:
    """The choices of one HTTP request, prompt by prompt."""

    service: AsyncEngine
    name: str
    choices: tuple[Choice, ...]

    def abort(self) -> None:
        """Ends what has not ended: also choices whose stream nobody has begun to read."""
        for index in range(len(self.choices)):
            self.service.abort(f"{self.name}-{index}")


def sampling_params(
    request: GenerationRequest,
    max_tokens: int | None,
    prompt_length: int,
    memory: int,
    sample: int,
    seed: int,
    rules: Rules,
) -> SamplingParams:
    """The engine's parameters of sample number `sample` of a prompt, behind which `memory` tokens fit; ApiError where the
    server does not allow them. A request that names no limit gets what there is."""
    room = rules.context_length - prompt_length
    for what, left in (
        (f"the model's context {rules.context_length}", room),
        ("the server's memory too few (--kv-slots of npr serve)", memory),
    ):
        if left < 1:
            raise ApiError(
                400,
                f"the prompt has {prompt_length} tokens, {what}: nothing fits behind",
                code="context_length_exceeded",
            )
    if max_tokens is not None and max_tokens > min(rules.max_tokens, memory):
        behind = f" behind a prompt of {prompt_length}" if memory < rules.max_tokens else ""
        raise ApiError(
            400,
            f"{request.limit_field} is {max_tokens}, this server decodes at most {min(rules.max_tokens, memory)} a response"
            f"{behind}",
            param=request.limit_field,
        )
    asked = max_tokens or min(rules.default_max_tokens, memory)
    branching = rules.branching if request.branching is None else request.branching
    temperature = 1.0 if request.temperature is None else request.temperature
    return SamplingParams(
        max_tokens=asked,
        max_critical_path=min(asked, room),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, LEAST_TOP_P),
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        max_branches=request.max_branches,
        branching=branching,
        constrain=rules.constrain and branching if request.constrain is None else request.constrain,
        seed=seed,
        sample_id=str(sample),
    )


def submit(
    service: AsyncEngine,
    model: ServedModel,
    metrics: Metrics,
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    rules: Rules,
    name: str,
) -> Job:
    """Queues `request.n` choices for each prompt, all or none; ApiError where the engine turns one away."""
    count = len(prompts) * (request.n or 1)
    if count > service.max_in_flight:
        raise ApiError(
            400, f"n x prompts are {count}, this server decodes {service.max_in_flight} at once", param="n"
        )
    silent = frozenset(model.vocabulary.eos_ids)
    choices: list[Choice] = []
    try:
        for prompt in prompts:
            seed = secrets.randbits(63) if request.seed is None else request.seed
            for sample in range(request.n or 1):
                memory = model.engine.room_behind(len(prompt))
                params = sampling_params(request, max_tokens, len(prompt), memory, sample, seed, rules)
                stream = service.generate_async(prompt, params, f"{name}-{len(choices)}")
                transcript = Transcript(
                    model.vocabulary, silent=silent, stops=request.stops, interleave=request.interleave
                )
                choices.append(Choice(stream, transcript, Stopwatch(metrics)))
    except (UserError, ApiError) as error:
        Job(service, name, tuple(choices)).abort()
        raise from_user_error(error) if isinstance(error, UserError) else error from None
    metrics.prompt_tokens.inc(sum(map(len, prompts)))
    return Job(service, name, tuple(choices))


async def decode(choice: Choice) -> AsyncGenerator[TextDelta | Ending]:
    """The text of a choice as it comes to be. Leaving it early aborts the choice.

    Raises:
        ApiError: the model failed (500), or the server is shutting down (503).
    """
    transcript, outcome = choice.transcript, "aborted"
    try:
        async with aclosing(choice.stream) as items:
            async for item in items:
                if isinstance(item, Rollout):
                    outcome = item.finish_reason.partition("(")[0]
                    _check_ended(item.finish_reason)
                    for delta in transcript.end():
                        yield delta
                    yield Ending(item.finish_reason, transcript.counts)
                    return
                choice.watch.tokens()
                for delta in transcript.push(item):
                    yield delta
                if transcript.stopped:
                    outcome = "stopped"
                    yield Ending("stopped", transcript.counts)
                    return
    except UserError as error:
        raise from_user_error(error) from None
    finally:
        counts = transcript.counts
        choice.watch.end(outcome, tokens=counts.tokens, forced=counts.forced)


def _check_ended(reason: str) -> None:
    if is_error(reason):
        raise ApiError(500, f"the response ended with {reason}", code="generation_failed")
    if reason == "aborted":
        raise ApiError(503, "the server is shutting down", code="unavailable", headers={"Retry-After": "10"})


async def decode_whole(choice: Choice) -> tuple[list[TextDelta], Ending]:
    """The whole text of a choice."""
    deltas: list[TextDelta] = []
    async with aclosing(decode(choice)) as items:
        async for item in items:
            if isinstance(item, Ending):
                return deltas, item
            deltas.append(item)
    raise AssertionError("a choice has no ending")


async def merged(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[tuple[int, Item]]:
    """Items of all streams as they come, with the stream's number; the first failure ends all."""
    ready: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue()

    async def feed(index: int, stream: AsyncGenerator[Item]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    ready.put_nowait((index, item))
        except Exception as caught:  # raised again where the items are read
            ready.put_nowait(caught)
        else:
            ready.put_nowait(None)

    tasks = [asyncio.create_task(feed(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
