"""Streaming: the same tokens as in one call, in order; cancellation, refusal, failure and shutdown leave nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_engine.async_engine import AsyncEngine, ClosedError, OverloadedError
from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel, KVCache, Step
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.streaming import TokenEvent
from npr_engine.testing import GRAMMAR
from npr_ext.errors import UserError
from tests.unit.engine.conftest import CONFIG, PROMPTS, Plain, fused

PARAMS = SamplingParams(max_tokens=250, temperature=1.2, seed=5)
ENDLESS = SamplingParams(max_tokens=3000, branching=False, ignore_eos=True)
TIGHT = {"num_kv_slots": 336, "block_size": 4, "max_batch_tokens": 24}


async def read(stream: AsyncGenerator[TokenEvent | Rollout]) -> tuple[list[TokenEvent], Rollout]:
    items = [item async for item in stream]
    events = [item for item in items if isinstance(item, TokenEvent)]
    rollout = items[-1]
    assert isinstance(rollout, Rollout) and len(events) == len(items) - 1
    return events, rollout


def streamed(events: list[TokenEvent]) -> dict[str, list[float]]:
    """The events put into packed order: a block is what comes between two events of the trunk."""
    parts: list[TokenEvent] = []
    block: list[TokenEvent] = []
    for event in events:
        if event.branch_id:
            block.append(event)
        else:
            parts += sorted(block, key=lambda e: e.branch_id)
            parts.append(event)
            block = []
    parts += sorted(block, key=lambda e: e.branch_id)
    names = ("token_ids", "forced", "logprobs")
    return {name: [x for event in parts for x in getattr(event, name).tolist()] for name in names}


def alone(engine: Engine, index: int) -> Rollout:
    return engine.generate([PROMPTS[index % len(PROMPTS)]], PARAMS, [str(index)])[0]


@pytest.mark.parametrize("sizes", [{}, TIGHT], ids=["roomy", "too little memory"])
def test_what_is_streamed_is_the_rollout_and_that_of_generate(
    sizes: dict[str, int], new_engine: Callable[..., Engine]
) -> None:
    engine = new_engine(**sizes)

    async def main() -> list[tuple[list[TokenEvent], Rollout]]:
        async with AsyncEngine(engine) as service:
            streams = [
                service.generate_async(PROMPTS[index % len(PROMPTS)], PARAMS, str(index))
                for index in range(12)
            ]
            return await asyncio.gather(*(read(stream) for stream in streams))

    for index, (events, rollout) in enumerate(asyncio.run(main())):
        expected = alone(new_engine(), index)
        assert rollout.token_ids.tolist() == expected.token_ids.tolist()
        assert rollout.finish_reason == expected.finish_reason
        told = streamed(events)
        assert told["token_ids"] == rollout.token_ids.tolist()
        assert told["forced"] == rollout.forced.tolist()
        np.testing.assert_array_equal(told["logprobs"], rollout.logprobs)
    engine.check_integrity()
    assert engine.num_unfinished == 0


def test_tokens_arrive_before_the_response_ends(new_engine: Callable[..., Engine]) -> None:
    async def main() -> int:
        async with AsyncEngine(new_engine()) as service:
            stream = service.generate_async(PROMPTS[0], ENDLESS, "a")
            async with aclosing(stream):
                first = await anext(stream)
                assert isinstance(first, TokenEvent)
                return len(first.token_ids)

    assert asyncio.run(main()) < 100


def test_a_cancelled_reader_aborts_its_request_and_no_other(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()

    async def main() -> Rollout:
        async with AsyncEngine(engine) as service:
            doomed = asyncio.create_task(read(service.generate_async(PROMPTS[0], ENDLESS, "doomed")))
            other = asyncio.create_task(read(service.generate_async(PROMPTS[1], PARAMS, "1")))
            await asyncio.sleep(0.02)
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            _, rollout = await other
            while service.num_in_flight:
                await asyncio.sleep(0.001)
            assert await service.run(lambda engine: engine.num_unfinished) == 0
            return rollout

    assert asyncio.run(main()).token_ids.tolist() == alone(new_engine(), 1).token_ids.tolist()
    engine.check_integrity()


def test_abort_ends_with_the_rollout_so_far(new_engine: Callable[..., Engine]) -> None:
    async def main() -> tuple[list[TokenEvent], Rollout]:
        async with AsyncEngine(new_engine()) as service:
            task = asyncio.create_task(read(service.generate_async(PROMPTS[0], ENDLESS, "a")))
            await asyncio.sleep(0.02)
            service.abort("a")
            service.abort("unknown")
            return await task

    events, rollout = asyncio.run(main())
    assert rollout.finish_reason == "aborted"
    assert streamed(events)["token_ids"] == rollout.token_ids.tolist()


def test_requests_beyond_the_limit_are_turned_away(new_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        async with AsyncEngine(new_engine(), max_in_flight=2) as service:
            assert service.is_open
            kept = [service.generate_async(PROMPTS[0], PARAMS, name) for name in "ab"]
            with pytest.raises(OverloadedError, match="2 requests are in flight"):
                service.generate_async(PROMPTS[0], PARAMS, "c")
            for stream in kept:
                await read(stream)
            await read(service.generate_async(PROMPTS[0], PARAMS, "c"))

    asyncio.run(main())


def test_mistakes_are_raised_at_once(new_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        async with AsyncEngine(new_engine()) as service:
            stream = service.generate_async(PROMPTS[0], PARAMS, "a")
            for prompt, params, name, text in (
                (PROMPTS[0], PARAMS, "a", "'a' is in flight"),
                ([], PARAMS, "b", "prompt is empty"),
                ([999], PARAMS, "b", "token ids in"),
                ([1], SamplingParams(max_tokens=100_000), "b", "raise num_kv_slots"),
                ([1], SamplingParams(max_tokens=1, stop_token_ids=(99,)), "b", "stop_token_ids"),
            ):
                with pytest.raises(UserError, match=text):
                    service.generate_async(prompt, params, name)
            await read(stream)
        assert not service.is_open
        with pytest.raises(ClosedError):
            service.generate_async(PROMPTS[0], PARAMS, "z")
        with pytest.raises(ClosedError):
            await service.run(lambda engine: engine.stats())

    asyncio.run(main())


def test_closing_ends_what_is_in_flight(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()

    async def main() -> list[tuple[list[TokenEvent], Rollout]]:
        service = AsyncEngine(engine)
        tasks = [asyncio.create_task(read(service.generate_async(PROMPTS[0], ENDLESS, n))) for n in "abc"]
        await asyncio.sleep(0.02)
        await asyncio.to_thread(service.close)
        service.close()
        return await asyncio.gather(*tasks)

    assert [rollout.finish_reason for _, rollout in asyncio.run(main())] == ["aborted"] * 3
    engine.check_integrity()
    assert engine.generate(PROMPTS[:1], PARAMS)[0].num_tokens > 0


class FailingModel(InferenceModel):
    """The model, but its forward fails where `fails` says so; it has written part of the KV by then."""

    fails: Callable[[], bool] = staticmethod(lambda: False)

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        logits = super().forward(step, cache)
        if self.fails():
            raise RuntimeError("the device is gone")
        return logits


def test_a_failing_model_ends_what_runs_and_serves_what_comes_later(plain: Plain) -> None:
    model = FailingModel(CONFIG, fused(plain.model, CONFIG))
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=4096))
    steps = iter(range(1000))

    async def main() -> None:
        async with AsyncEngine(engine) as service:
            expected = (await read(service.generate_async(PROMPTS[1], PARAMS, "1")))[1]
            model.fails = lambda: next(steps) == 20
            reads = [read(service.generate_async(PROMPTS[0], ENDLESS, name)) for name in "ab"]
            for events, rollout in await asyncio.gather(*reads):
                assert rollout.finish_reason == "error(RuntimeError: the device is gone)"
                assert streamed(events)["token_ids"] == rollout.token_ids.tolist()
                assert rollout.num_tokens > 5
            again = (await read(service.generate_async(PROMPTS[1], PARAMS, "1")))[1]
            assert again.token_ids.tolist() == expected.token_ids.tolist()

    asyncio.run(main())
    engine.check_integrity()


def test_new_weights_and_released_memory_come_between_two_steps(plain: Plain) -> None:
    weights = {name: tensor.clone() for name, tensor in fused(plain.model, CONFIG).items()}
    engine = Engine(InferenceModel(CONFIG, weights), GRAMMAR, EngineConfig(num_kv_slots=4096))

    async def main() -> None:
        async with AsyncEngine(engine) as service:
            task = asyncio.create_task(read(service.generate_async(PROMPTS[0], ENDLESS, "a")))
            await asyncio.sleep(0.02)
            await service.run(Engine.release_memory)
            norm = {
                "decoder.final_layernorm.weight": torch.zeros_like(weights["decoder.final_layernorm.weight"])
            }
            await service.run(lambda engine: engine.update_weights(norm, 3))
            with pytest.raises(UserError, match="not newer"):
                await service.run(lambda engine: engine.update_weights(norm, 3))
            await service.run(Engine.resume_memory)
            _, rollout = await task
            assert rollout.weights_version == 3 and rollout.num_tokens == 3000
            assert rollout.logprobs[-1] == pytest.approx(-np.log(CONFIG.vocab_size))

    asyncio.run(main())


def test_readers_do_not_wait_for_a_thread_that_broke_down(plain: Plain) -> None:
    model = FailingModel(CONFIG, fused(plain.model, CONFIG))
    steps = iter(range(1000))

    def fails() -> bool:
        if next(steps) == 20:
            raise SystemExit("a fault that is no model's")
        return False

    model.fails = fails

    async def main() -> None:
        service = AsyncEngine(Engine(model, GRAMMAR, EngineConfig(num_kv_slots=4096)))
        with pytest.raises(ClosedError, match="a fault that is no model's"):
            await read(service.generate_async(PROMPTS[0], ENDLESS, "a"))
        with pytest.raises(ClosedError):
            service.generate_async(PROMPTS[0], ENDLESS, "b")
        assert not service.is_open
        service.close()

    asyncio.run(main())
