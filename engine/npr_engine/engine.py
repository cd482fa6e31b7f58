"""NPR-Engine: prompts in, rollouts out, branches decoded in one batch.

generate ─► Scheduler.submit
              └► plan ─► Runner.run (model, sampler) ─► commit ─┐
                  ▲                                             │ until nothing is left
                  └─────────────────────────────────────────────┘ ─► Rollout of each request, in order

submit, step, step, ... is the same loop turned by the caller: AsyncEngine turns it in a thread.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from npr_engine.executor.runner import Runner
from npr_engine.language.grammar import Grammar
from npr_engine.language.token_ids import TokenIds
from npr_engine.model.linear import Weight
from npr_engine.model.transformer import InferenceModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.limits import Limits
from npr_engine.scheduler.response_queue import Finished
from npr_engine.scheduler.response_state import Request
from npr_engine.scheduler.scheduler import Scheduler
from npr_engine.scheduler.streaming import TokenEvent
from npr_ext.errors import UserError


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine.

    Attributes:
        num_kv_slots: tokens whose KV fits; rounded down to blocks.
        block_size: slots of a block; a response leaves less than one block unused.
        max_batch_tokens: tokens a step feeds at most, decoding first, then chunks of prompts.
        max_running_requests: responses that run at once.
    """

    num_kv_slots: int = 65_536
    block_size: int = 4
    max_batch_tokens: int = 4_096
    max_running_requests: int = 512

    def __post_init__(self) -> None:
        rules = {
            "num_kv_slots": self.block_size,
            "block_size": 1,
            "max_batch_tokens": 2,
            "max_running_requests": 1,
        }
        for name, least in rules.items():
            value = getattr(self, name)
            if value < least:
                raise UserError(f"engine: {name} is {value}, it must be >= {least}")


@dataclass(frozen=True)
class EngineStats:
    """Totals since the engine was made.

    `model_seconds` are spent in forward and sampler, `seconds` in all steps; `overhead_us_per_step` is the
    rest of a step. `forced_tokens` count when their response ends. `kv_utilisation` is the share of KV slots
    that held a token which some branch sees when memory ran out for the first time; None as long as it has
    not. `running` and `waiting` are requests of this moment. `graph_steps` replayed a CUDA graph.
    """

    steps: int
    sampled_tokens: int
    computed_tokens: int
    forced_tokens: int
    recomputed_tokens: int
    preemptions: int
    forks: int
    joins: int
    peak_blocks: int
    kv_utilisation: float | None
    num_blocks: int
    free_blocks: int
    running: int
    waiting: int
    graph_steps: int
    seconds: float
    model_seconds: float

    @property
    def overhead_us_per_step(self) -> float:
        return 1e6 * (self.seconds - self.model_seconds) / max(self.steps, 1)


@dataclass(frozen=True)
class StepOutput:
    """What a step has brought: tokens, in an order in which each follows what it sees, and responses that ended."""

    events: list[TokenEvent]
    rollouts: list[Rollout]


class Engine:
    """A model, a grammar and KV memory. One thread uses it; with tensor parallelism every rank calls it alike.

    Engines whose models share experts (ExpertRanks) generate together, each its own requests, also none: all
    call `generate`, or all call `step` as often as the one that needs most.
    """

    def __init__(self, model: InferenceModel, grammar: Grammar, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        num_blocks = config.num_kv_slots // config.block_size
        # A response that runs holds a slot at least: no more can run, and tables have a place for each.
        running = min(config.max_running_requests, config.num_kv_slots)
        limits = Limits(num_blocks, config.block_size, config.max_batch_tokens, running)
        self._scheduler = Scheduler(grammar, limits, model.config.vocab_size)
        self._runner = Runner(model, num_blocks * config.block_size, self._scheduler.constraint)
        self._weights_version = 0
        self._seconds = self._model_seconds = 0.0

    def generate(
        self,
        prompts: Sequence[TokenIds],
        sampling: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """A rollout for each prompt, in their order.

        Args:
            prompts: token ids of each prompt; equal prompts share their KV.
            sampling: for all, or one for each.
            request_ids: different ones; "0", "1", ... by default. With the seed they fix every draw.
            on_progress: called with (finished, total) when responses end; it may call `abort`.
        """
        self._need_memory()
        requests = self._requests(prompts, sampling, request_ids)
        if not self._scheduler.num_unfinished:
            self._scheduler.begin_anew()
        place = {request.request_id: index for index, request in enumerate(requests)}
        rollouts: list[Rollout | None] = [None] * len(requests)
        for request in requests:
            self._scheduler.submit(request)
        try:
            with old_objects_left_alone():
                while self.model.any_busy(self._scheduler.num_unfinished > 0):
                    self._step()
                    finished = self._scheduler.take_finished()
                    for ended in finished:
                        rollouts[place[ended.request.request_id]] = self._rollout(ended)
                    if finished and on_progress is not None:
                        on_progress(len(requests) - self._scheduler.num_unfinished, len(requests))
        except BaseException:
            self._abandon(requests)
            raise
        for ended in self._scheduler.take_finished():
            rollouts[place[ended.request.request_id]] = self._rollout(ended)
        assert all(rollout is not None for rollout in rollouts)
        return [rollout for rollout in rollouts if rollout is not None]

    @property
    def has_memory(self) -> bool:
        return self._runner.has_memory

    @property
    def weights_version(self) -> int:
        return self._weights_version

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self._scheduler.num_unfinished

    def request(self, prompt: TokenIds, sampling: SamplingParams, request_id: str) -> Request:
        """A request as `submit` takes it; UserError where it is malformed or can never fit. Any thread may
        call this."""
        request = Request(request_id, np.ascontiguousarray(prompt, dtype=np.int32), sampling)
        size = self.model.config.vocab_size
        ids = request.prompt_ids
        if ids.ndim != 1 or (ids < 0).any() or (ids >= size).any():
            raise UserError(f"request {request_id}: the prompt must be token ids in [0, {size})")
        outside = [token for token in sampling.stop_token_ids if not 0 <= token < size]
        if outside:
            raise UserError(f"request {request_id}: stop_token_ids {outside} are no token ids in [0, {size})")
        self._scheduler.check(request)
        return request

    def room_behind(self, prompt_tokens: int) -> int:
        """The largest `max_tokens` of a response to a prompt of so many tokens that ever fits; below 1: none
        does. Any thread may call this."""
        return self._scheduler.room_behind(prompt_tokens)

    def submit(self, request: Request) -> None:
        """Queues a request for `step`; its id must not be that of another one that has not ended."""
        self._scheduler.submit(request)

    def step(self) -> StepOutput:
        """One step of everything that was submitted. An exception of the model passes through; `fail_all`
        then makes the engine usable again."""
        self._need_memory()
        self._step(stream=True)
        return self.take_output()

    def take_output(self) -> StepOutput:
        """What has come to be since the last step (an abort leaves a rollout without one)."""
        events = self._scheduler.take_events()
        return StepOutput(events, [self._rollout(ended) for ended in self._scheduler.take_finished()])

    def fail_all(self, reason: str) -> None:
        """After a step that raised: ends every request with this reason and what it had before; no KV is trusted."""
        self._scheduler.fail_all(reason)

    def abort(self, request_id: str) -> bool:
        """Ends a request with what it has decoded, reason "aborted"; False where no such request runs or waits."""
        return self._scheduler.abort(request_id)

    def weights_updated(self, version: int) -> None:
        """The weights are others now: all KV is void, rollouts from here on carry `version`."""
        self.model.refresh()
        self._scheduler.restart_all()
        self._weights_version = version

    def update_weights(self, weights: Mapping[str, Weight], version: int) -> None:
        """Copies weights into the model's own tensors, in place; those that are these tensors already cost nothing.

        All KV is void then; what runs starts over from its tokens. All or nothing:

        Args:
            weights: any of the model's weights, by its names, of this rank's shapes.
            version: greater than the current one; rollouts carry it.

        Raises:
            UserError: a name that the model has not, another shape or type, an old version. Nothing has changed.
        """
        if version <= self._weights_version:
            raise UserError(
                f"update_weights: version {version} is not newer than {self._weights_version}, which is loaded"
            )
        self.model.load(weights)
        self.weights_updated(version)

    def release_memory(self) -> None:
        """Frees the KV cache (the trainer needs the room)."""
        self._scheduler.restart_all()
        self._runner.release_memory()

    def resume_memory(self) -> None:
        self._runner.resume_memory()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            **asdict(scheduler.counters),
            num_blocks=scheduler.limits.num_blocks,
            free_blocks=scheduler.num_free_blocks,
            running=scheduler.num_running,
            waiting=scheduler.num_unfinished - scheduler.num_running,
            graph_steps=self._runner.num_replays,
            seconds=self._seconds,
            model_seconds=self._model_seconds,
        )

    def check_integrity(self) -> None:
        """Asserts that no KV block, slot, row or request slot is lost or has two owners."""
        self._scheduler.check_integrity()

    def _need_memory(self) -> None:
        if not self._runner.has_memory:
            raise UserError("the engine's memory is released: call resume_memory() before it generates")

    def _step(self, *, stream: bool = False) -> None:
        start = time.perf_counter()
        batch = self._scheduler.plan()
        if batch is None:
            self._runner.run_empty()
            return
        inputs = self._scheduler.sample_inputs(batch)
        before = time.perf_counter()
        sampled = self._runner.run(batch, inputs)
        after = time.perf_counter()
        self._scheduler.commit(batch, sampled, stream=stream)
        self._model_seconds += after - before
        self._seconds += time.perf_counter() - start

    def _requests(
        self,
        prompts: Sequence[TokenIds],
        sampling: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str] | None,
    ) -> list[Request]:
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        ids = [str(index) for index in range(len(prompts))] if request_ids is None else list(request_ids)
        if not len(prompts) == len(params) == len(ids):
            raise UserError(
                f"{len(prompts)} prompts, {len(params)} sampling parameters, {len(ids)} request ids"
            )
        if len(set(ids)) != len(ids):
            repeated = next(request_id for request_id in ids if ids.count(request_id) > 1)
            raise UserError(f"request id {repeated!r} is given twice: ids name requests and fix their draws")
        return [self.request(*fields) for fields in zip(prompts, params, ids, strict=True)]

    def _abandon(self, requests: list[Request]) -> None:
        """After an error: no request is left, no KV is trusted, the engine is as new."""
        self._scheduler.restart_all()
        for request in requests:
            self._scheduler.abort(request.request_id)
        self._scheduler.take_finished()

    def _rollout(self, ended: Finished) -> Rollout:
        return Rollout(
            request_id=ended.request.request_id,
            prompt_ids=ended.request.prompt_ids,
            token_ids=ended.record.tokens,
            logprobs=ended.record.logprobs,
            sampler_logprobs=ended.record.sampler_logprobs,
            forced=ended.record.forced,
            branch_ids=ended.branch_ids,
            decode_steps=ended.record.steps,
            positions=ended.record.positions,
            finish_reason=ended.reason,
            branching=ended.request.params.branching,
            constrained=ended.request.params.constrain,
            weights_version=self._weights_version,
        )


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Spares full garbage collections the objects that exist already (modules, graphs: hundreds of
    thousands); they cost as much as the scheduler itself otherwise."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
