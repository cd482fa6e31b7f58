"""What a GPU does with the engine: decoding against the roofline, graphs, waits, forks and joins, transformers.

random weights ─┬─► plain decoding at 1 and more rows, bf16 and FP8 ─► ms a step, share of the roofline, waits
                ├─► scripted responses, 64 branches at once         ─► the same
                ├─► one scripted response, step by step             ─► what fork and join cost
                └─► transformers.generate on the same shape         ─► ratio

A step's time is the difference of two runs that differ in their number of steps: prompts, forks and joins cancel out.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_npr.bench.contenders.greedy import Contender, Ours, Transformers, alternate, times_faster
from megatron_npr.bench.cpu.script import Script, response_script
from megatron_npr.bench.gpu import model as gpu_model
from megatron_npr.bench.gpu.model import ScriptedModel, bytes_read, random_weights
from megatron_npr.bench.gpu.result import DecodeFigures, EngineFigures, ForkFigures
from megatron_npr.bench.gpu.timing import copy_bandwidth, median_seconds, waits
from npr_engine.engine import Engine, EngineConfig
from npr_engine.executor.device_table import DeviceTable
from npr_engine.model.transformer import InferenceModel, ModelConfig
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.batch import Batch
from npr_engine.testing import GRAMMAR


@dataclass(frozen=True)
class Sizes:
    """What is measured. `steps`: of the shorter and the longer run; `requests` x `branches` rows decode at once."""

    model: ModelConfig
    dtype: torch.dtype
    copied_bytes: int
    kv_slots: int
    prompt_tokens: int = 32
    steps: tuple[int, int] = (32, 160)
    requests: int = 8
    branches: int = 8
    batch: int = 32
    prefix_tokens: int = 4096
    repeats: int = 5


FULL = Sizes(gpu_model.FULL, torch.bfloat16, 4 << 30, 65_536)
TINY = Sizes(
    replace(gpu_model.TINY, vocab_size=128),
    torch.float32,
    1 << 20,
    4096,
    prompt_tokens=4,
    steps=(3, 6),
    requests=2,
    branches=2,
    batch=2,
    prefix_tokens=64,
    repeats=2,
)


def measure(device: torch.device, *, tiny: bool) -> EngineFigures:
    """All of it; one engine at a time, all over the same weights."""
    sizes = TINY if tiny else FULL
    weights = random_weights(sizes.model, device, sizes.dtype)
    bandwidth = copy_bandwidth(device, sizes.copied_bytes)
    rows, decoding = sizes.requests * sizes.branches, {}
    for fp8 in (False, True):
        engine = new_engine(InferenceModel(sizes.model, weights, fp8=fp8), sizes)
        read = bytes_read(sizes.model, sizes.dtype, fp8=fp8)
        for count in (1, rows):
            name = f"batch {count}" + (", FP8" if fp8 else "")
            run = plain_run(engine, count, sizes)
            decoding[name] = decode_figures(engine, run, count, read / bandwidth, sizes)
        if not fp8:
            versus = versus_transformers(engine, sizes)
        del engine, run
    model = ScriptedModel(sizes.model, weights, sizes.kv_slots)
    engine = new_engine(model, sizes)
    read = bytes_read(sizes.model, sizes.dtype, fp8=False)
    run = branching_run(engine, model, sizes)
    decoding[f"{rows} branches"] = decode_figures(engine, run, rows, read / bandwidth, sizes)
    return EngineFigures(
        model="tiny" if tiny else gpu_model.NAME,
        dtype=str(sizes.dtype).removeprefix("torch."),
        copy_bandwidth=bandwidth,
        decoding=decoding,
        fork_join=fork_figures(engine, model, sizes),
        transformers_batch=sizes.batch,
        versus_transformers=versus,
    )


def new_engine(model: InferenceModel, sizes: Sizes) -> Engine:
    return Engine(model, GRAMMAR, EngineConfig(num_kv_slots=sizes.kv_slots))


def prompts(rows: int, sizes: Sizes) -> list[list[int]]:
    """Different ones, of text."""
    generator = np.random.default_rng(0)
    drawn: list[list[int]] = generator.integers(12, 40, (rows, sizes.prompt_tokens)).tolist()
    return drawn


def plain_run(engine: Engine, rows: int, sizes: Sizes) -> Callable[[int], object]:
    """Decodes so many tokens of every row."""

    def run(steps: int) -> object:
        sampling = SamplingParams(steps, branching=False, ignore_eos=True)
        return engine.generate(prompts(rows, sizes), sampling)

    return run


def branching_run(engine: Engine, model: ScriptedModel, sizes: Sizes) -> Callable[[int], object]:
    """Every request forks once; so many tokens of every branch, all of them at once."""

    def run(steps: int) -> object:
        script = _script(sizes.prompt_tokens, sizes.branches, steps)
        model.follow(script.next_token)
        rollouts = engine.generate(prompts(sizes.requests, sizes), script.params)
        assert all(rollout.finish_reason == "eos" for rollout in rollouts), rollouts[0].finish_reason
        return rollouts

    return run


def _script(prompt_tokens: int, branches: int, branch_tokens: int) -> Script:
    return response_script(GRAMMAR.vocabulary, prompt_tokens, branches=branches, branch_tokens=branch_tokens)


def decode_figures(
    engine: Engine, run: Callable[[int], object], rows: int, ideal_seconds: float, sizes: Sizes
) -> DecodeFigures:
    """Figures of the steps by which a longer run exceeds a shorter one; `ideal_seconds`: what reading the weights takes."""
    few, many = sizes.steps
    seconds = [_median_run(partial(run, steps), sizes.repeats) for steps in (few, many)]
    per_step = (seconds[1] - seconds[0]) / (many - few)
    (steps, replays), (more_steps, more_replays) = (
        _counts(engine, partial(run, each)) for each in (few, many)
    )
    waited = [len(waits(partial(run, each), engine.model.device)) for each in (few, 2 * few)]
    return DecodeFigures(
        rows=rows,
        ms_per_step=1e3 * per_step,
        tokens_per_second=rows / per_step,
        roofline_share=ideal_seconds / per_step,
        graph_share=(more_replays - replays) / (more_steps - steps),
        waits_per_step=(waited[1] - waited[0]) / few,
    )


def _median_run(work: Callable[[], object], repeats: int) -> float:
    """Seconds after one run that compiles, captures and fills the cache of prompts; each ends with tokens on the host."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _counts(engine: Engine, work: Callable[[], object]) -> tuple[int, int]:
    """(steps, those that replayed a graph) of a run."""
    before = engine.stats()
    work()
    after = engine.stats()
    return after.steps - before.steps, after.graph_steps - before.graph_steps


@dataclass(frozen=True)
class _StepCost:
    """Seconds of a step, and what of them the scheduler took; whether it forked or joined."""

    seconds: float
    scheduler: float
    eventful: bool


def fork_figures(engine: Engine, model: ScriptedModel, sizes: Sizes) -> ForkFigures:
    """One response with one block behind a long prompt, step by step; the first one warms up."""
    few, _ = sizes.steps
    script = _script(sizes.prefix_tokens, sizes.branches, few)
    model.follow(script.next_token)
    prompt = [12 + index % 20 for index in range(sizes.prefix_tokens)]
    operations, steps = [], []
    for repeat in range(sizes.repeats + 1):
        engine.submit(engine.request(prompt, script.params, str(repeat)))
        costs = []
        while engine.num_unfinished:
            costs.append(_costed_step(engine))
        # The step before an eventful one ends with the tag: its commit plans the fork or the join.
        near = {index - back for index, cost in enumerate(costs) if cost.eventful for back in (0, 1)}
        quiet = [cost for index, cost in enumerate(costs[2:], 2) if index not in near]
        usual = statistics.median(cost.seconds for cost in quiet)
        usual_scheduler = statistics.median(cost.scheduler for cost in quiet)
        steps.append(sum(cost.seconds - usual for cost in costs if cost.eventful))
        operations.append(sum(costs[index].scheduler - usual_scheduler for index in near))
    update = table_update_seconds(engine.model.device, sizes)
    return ForkFigures(
        branches=sizes.branches,
        prefix_tokens=sizes.prefix_tokens,
        operations_us=1e6 * (statistics.median(operations[1:]) + update),
        steps_us=1e6 * statistics.median(steps[1:]),
    )


def _costed_step(engine: Engine) -> _StepCost:
    before = engine.stats()
    engine.step()
    after = engine.stats()
    seconds = after.seconds - before.seconds
    model = after.model_seconds - before.model_seconds
    eventful = (after.forks, after.joins) != (before.forks, before.joins)
    return _StepCost(seconds, seconds - model, eventful)


def table_update_seconds(device: torch.device, sizes: Sizes) -> float:
    """New rows on the device for all branches, each with its prefix, and for what they join to."""
    forked, few = sizes.branches, sizes.steps[0]
    joined = sizes.prefix_tokens + forked * few
    tables = np.arange((forked + 1) * joined, dtype=np.int32).reshape(forked + 1, joined)
    generations = np.zeros(forked + 1, np.int64)
    table = DeviceTable(device)

    def update(rows: list[int], length: int) -> object:
        generations[rows] += 1
        count = np.zeros(len(rows), np.int32)
        return table.update(
            Batch(
                token_ids=count,
                positions=count,
                slots=count,
                rows=np.array(rows, np.int32),
                lengths=count + length,
                block_tables=tables,
                generations=generations,
                sample_index=np.arange(len(rows)),
                sample_rows=np.array(rows, np.int32),
                num_decode=len(rows),
            )
        )

    fork = partial(update, list(range(forked)), sizes.prefix_tokens)
    return median_seconds(fork, device) + median_seconds(partial(update, [forked], joined), device)


def versus_transformers(engine: Engine, sizes: Sizes) -> float | None:
    """Their seconds over ours on the same prompts; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    contenders: dict[str, Contender] = {
        "ours": Ours(engine),
        "transformers": Transformers(_their_model(engine.model, sizes)),
    }
    _, tokens = sizes.steps
    drawn = np.random.default_rng(0).integers(12, 40, (sizes.repeats + 1, sizes.batch, sizes.prompt_tokens))
    warm_up, *batches = drawn.tolist()
    alternate(contenders, [warm_up], tokens)
    decoded = alternate(contenders, batches, tokens)
    return times_faster(decoded["ours"], decoded["transformers"])


def _their_model(model: InferenceModel, sizes: Sizes) -> Any:
    """transformers' Qwen3 of the same shape, with random weights of its own on the same device."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = model.config
    theirs = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tied_embeddings,
    )
    with torch.device(model.device):
        return AutoModelForCausalLM.from_config(theirs, dtype=sizes.dtype).eval()
