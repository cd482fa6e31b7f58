"""`npr bench engine`: how fast the engine decodes, alone and against others, and what its branches are worth.

for each precision:
    plain decoding at 1, 5, 16, 32 sequences, others in turns with ours ─► tokens/s, ratios, overhead of a step
    a response with a block of 5 branches, with and without branches    ─► speedups, parallel efficiency
branching responses in too little memory                                ─► share of KV slots that are live
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_npr.bench.contenders.greedy import (
    Contender,
    Ours,
    Transformers,
    alternate,
    random_prompts,
    same_responses,
    times_faster,
    tokens_per_second,
)
from megatron_npr.bench.contenders.vllm_process import Stillness, Vllm, VllmSettings
from megatron_npr.bench.cpu import branch_response, kv_pressure
from megatron_npr.bench.cpu.bench_model import Opened, made_folder, open_model
from megatron_npr.bench.cpu.branch_response import BranchFigures
from megatron_npr.bench.cpu.kv_pressure import PressureFigures
from megatron_npr.bench.cpu.script import Script, response_script
from megatron_npr.training.session import DTYPES
from npr_engine.engine import Engine, EngineConfig
from npr_ext import cpu_isa
from npr_ext.errors import UserError

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class EngineBench:
    """What is measured.

    Attributes:
        model: Hugging Face folder; where it does not exist it becomes SmolLM2-135M.
        vllm_python: interpreter that has vLLM, or None: not against vLLM.
        repeats: batches of each size, with different prompts.
        batches: sequences at once; at `main_batch`, in the first of `dtypes`, also against transformers.
        pressure_slots, pressure_responses: KV slots, and responses that want more of them than there are;
            pressure_blocks: sizes of a block, the first one's figure stands on top.
    """

    model: Path
    vllm_python: Path | None = None
    repeats: int = 3
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    batches: tuple[int, ...] = (1, 5, 16, 32)
    main_batch: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 128
    branches: int = 5
    branch_tokens: int = 100
    pressure_slots: int = 8192
    pressure_responses: int = 32
    pressure_blocks: tuple[int, ...] = (EngineConfig.block_size, 16)

    def __post_init__(self) -> None:
        assert self.main_batch in self.batches
        if self.repeats < 1:
            raise UserError(f"--repeats is {self.repeats}, it must be >= 1")
        python = self.vllm_python
        if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
            raise UserError(f"--vllm-python {python} is no program: name the bin/python of a venv with vLLM")


@dataclass(frozen=True)
class Versus:
    """Another engine on the same prompts, in turns with ours."""

    tokens_per_second: float
    times_faster: float
    same_responses: float


@dataclass(frozen=True)
class DecodeFigures:
    """Plain decoding of a batch. Overhead is all that a step does outside the model's forward; the sampler's part of
    it is named too."""

    dtype: str
    batch: int
    tokens_per_second: float
    steps: int
    us_per_step: float
    overhead_us_per_step: float
    overhead_share: float
    sampler_us_per_step: float
    against: dict[str, Versus]


def measure(bench: EngineBench) -> dict[str, object]:
    """All figures; those of the first precision at the main batch stand on top."""
    load_before = os.getloadavg()[0]
    decoding: list[DecodeFigures] = []
    branching: dict[str, BranchFigures] = {}
    stillness: dict[str, Stillness] = {}
    with _bound_to_cores(torch.get_num_threads()) as cores:
        folder = made_folder(bench.model)
        for dtype in bench.dtypes:
            opened = open_model(folder, DTYPES[dtype])
            plain, still = _measure_decoding(bench, folder, opened, dtype, cores)
            decoding += plain
            stillness |= {dtype: still} if still else {}
            branching[dtype] = _measure_branching(bench, opened)
        pressure = [_measure_pressure(bench, opened, size) for size in bench.pressure_blocks]
    main = next(figures for figures in decoding if figures.batch == bench.main_batch)
    branches = branching[main.dtype]
    return {
        "model": folder.name,
        "dtype": main.dtype,
        "batch": main.batch,
        "tokens_per_second": main.tokens_per_second,
        "steps": main.steps,
        "ideal_speedup": branches.phase_ideal_speedup,
        "wall_speedup": branches.phase_wall_speedup,
        "parallel_efficiency": branches.parallel_efficiency,
        "vs_transformers": main.against["transformers"].times_faster,
        "kv_utilisation": pressure[0].kv_utilisation,
        "overhead_us_per_step": main.overhead_us_per_step,
        "overhead_share": main.overhead_share,
        "cpu_isa": cpu_isa(),
        "threads": torch.get_num_threads(),
        "load_average": [load_before, os.getloadavg()[0]],
        "prompt_tokens": bench.prompt_tokens,
        "new_tokens": bench.new_tokens,
        "repeats": bench.repeats,
        "decoding": [asdict(figures) for figures in decoding],
        "branching": {dtype: asdict(figures) for dtype, figures in branching.items()},
        "pressure": [asdict(figures) for figures in pressure],
        "vllm_stillness": {dtype: asdict(still) for dtype, still in stillness.items()},
    }


def _measure_decoding(
    bench: EngineBench, folder: Path, opened: Opened, dtype: str, cores: Sequence[int]
) -> tuple[list[DecodeFigures], Stillness | None]:
    """Every batch size; nobody but the one whose turn it is uses the cores."""
    engine = Engine(opened.model, opened.grammar, EngineConfig(num_kv_slots=_num_slots(bench)))
    others: dict[str, Contender] = {}
    with ExitStack() as stack:
        if bench.vllm_python is not None:
            length = bench.prompt_tokens + bench.new_tokens
            settings = VllmSettings(bench.vllm_python, folder, DTYPES[dtype], length, tuple(cores))
            vllm = stack.enter_context(Vllm(settings))
            others["vllm"] = vllm
        figures = []
        for batch in bench.batches:
            rivals = dict(others)
            if batch == bench.main_batch and dtype == bench.dtypes[0]:
                rivals["transformers"] = Transformers.of_folder(folder, DTYPES[dtype])
            figures.append(_measure_batch(bench, opened, engine, dtype, batch, rivals))
        return figures, vllm.stillness() if bench.vllm_python is not None else None


def _measure_batch(
    bench: EngineBench,
    opened: Opened,
    engine: Engine,
    dtype: str,
    batch: int,
    others: Mapping[str, Contender],
) -> DecodeFigures:
    contenders = {"ours": Ours(engine), **others}
    vocabulary = opened.grammar.vocabulary
    warm_up, *batches = (
        random_prompts(vocabulary, batch, bench.prompt_tokens, seed=(batch, repeat))
        for repeat in range(bench.repeats + 1)
    )
    alternate(contenders, [warm_up], WARM_UP_TOKENS)
    before = engine.stats()
    opened.model.restart_clock()
    decoded = alternate(contenders, batches, bench.new_tokens)
    after = engine.stats()
    steps = after.steps - before.steps
    seconds = after.seconds - before.seconds
    overhead = seconds - opened.model.forward_seconds
    sampler = after.model_seconds - before.model_seconds - opened.model.forward_seconds
    ours = decoded["ours"]
    return DecodeFigures(
        dtype=dtype,
        batch=batch,
        tokens_per_second=tokens_per_second(ours),
        steps=steps // bench.repeats,
        us_per_step=1e6 * seconds / steps,
        overhead_us_per_step=1e6 * overhead / steps,
        overhead_share=overhead / seconds,
        sampler_us_per_step=1e6 * sampler / steps,
        against={
            name: Versus(
                tokens_per_second(decoded[name]),
                times_faster(ours, decoded[name]),
                same_responses(ours, decoded[name]),
            )
            for name in others
        },
    )


def _measure_branching(bench: EngineBench, opened: Opened) -> BranchFigures:
    script = _script(bench, opened)
    engine = Engine(opened.model, opened.grammar, EngineConfig(num_kv_slots=_num_slots(bench)))
    prompt = random_prompts(opened.grammar.vocabulary, 1, bench.prompt_tokens, seed=(0,))[0]
    return branch_response.measure(engine, opened.model, script, prompt, bench.repeats)


def _measure_pressure(bench: EngineBench, opened: Opened, block_size: int) -> PressureFigures:
    config = EngineConfig(num_kv_slots=bench.pressure_slots, block_size=block_size)
    engine = Engine(opened.model, opened.grammar, config)
    vocabulary = opened.grammar.vocabulary
    prompts = random_prompts(vocabulary, bench.pressure_responses, bench.prompt_tokens, seed=(0,))
    return kv_pressure.measure(engine, opened.model, _script(bench, opened), prompts)


def _script(bench: EngineBench, opened: Opened) -> Script:
    return response_script(
        opened.grammar.vocabulary,
        bench.prompt_tokens,
        branches=bench.branches,
        branch_tokens=bench.branch_tokens,
    )


def _num_slots(bench: EngineBench) -> int:
    """Twice what the largest batch, or the branching response, needs: nothing is ever preempted."""
    plain = max(bench.batches) * (bench.prompt_tokens + bench.new_tokens)
    return 2 * max(plain, 4 * bench.branches * bench.branch_tokens)


@contextmanager
def _bound_to_cores(threads: int) -> Iterator[list[int]]:
    """This thread, and those that it starts from here on, on one core for each: those that other engines get too."""
    available = sorted(os.sched_getaffinity(0))
    if threads > len(available):
        raise UserError(f"--threads {threads}: this process may use {len(available)} cores, ask for no more")
    os.sched_setaffinity(0, available[:threads])
    try:
        yield available[:threads]
    finally:
        os.sched_setaffinity(0, available)
