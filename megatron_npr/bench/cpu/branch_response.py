"""What branches are worth: one response with one block of branches, against as many tokens in one plain sequence.

Script (what the model says, by position) ─► decoded with branches ─► as many tokens without ─► (in turns, medians)
    <guideline> 5 plans </guideline>  5 branches of 100 tokens in as many steps  <takeaway> ... </takeaway> ... <eos>
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npr.bench.cpu.bench_model import BenchModel
from megatron_npr.bench.cpu.script import Script
from npr_engine.engine import Engine
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.trace import examine


@dataclass(frozen=True)
class BranchFigures:
    """Medians over repeats. `phase` is from the fork to the last branch's end, `response` all of it with its prompt;
    ideal speedups count sampled tokens over those of the longest path, wall speedups divide seconds for as many
    tokens decoded in one sequence by seconds with branches."""

    branches: int
    branch_tokens: int
    sampled_tokens: int
    parallel_efficiency: float
    phase_ideal_speedup: float
    phase_wall_speedup: float
    response_ideal_speedup: float
    response_wall_speedup: float
    phase_seconds: float
    phase_sequential_seconds: float


@dataclass(frozen=True)
class _Timed:
    """Seconds of the branch phase and of the whole."""

    phase: float
    response: float


def measure(
    engine: Engine, model: BenchModel, script: Script, prompt: Sequence[int], repeats: int
) -> BranchFigures:
    """Decode with and without branches in turns, after one turn of each that warms up (and fills the prompt's KV)."""
    with_branches, without = [], []
    for repeat in range(repeats + 1):
        rollout, timed = _decode_branching(engine, model, script, prompt)
        plain = _decode_plain(engine, model, script, prompt)
        if repeat:
            with_branches.append(timed)
            without.append(plain)
    pairs = list(zip(with_branches, without, strict=True))
    execution = examine(rollout)
    assert not execution.faults and execution.parallel_blocks == 1, execution
    return BranchFigures(
        branches=script.branches,
        branch_tokens=script.branch_tokens,
        sampled_tokens=execution.sampled,
        parallel_efficiency=execution.parallel_efficiency,
        phase_ideal_speedup=float(script.branches),
        phase_wall_speedup=statistics.median(plain.phase / timed.phase for timed, plain in pairs),
        response_ideal_speedup=execution.sampled / execution.ideal_steps,
        response_wall_speedup=statistics.median(plain.response / timed.response for timed, plain in pairs),
        phase_seconds=statistics.median(timed.phase for timed in with_branches),
        phase_sequential_seconds=statistics.median(plain.phase for plain in without),
    )


def _decode_branching(
    engine: Engine, model: BenchModel, script: Script, prompt: Sequence[int]
) -> tuple[Rollout, _Timed]:
    model.restart_clock()
    model.script = script.next_token
    first_step = engine.stats().steps
    began = time.perf_counter()
    try:
        rollout = engine.generate([prompt], script.params)[0]
    finally:
        model.script = None
    seconds = time.perf_counter() - began
    assert rollout.finish_reason == "eos", f"the scripted response ended by {rollout.finish_reason}"
    steps = rollout.decode_steps[(rollout.branch_ids > 0) & ~rollout.forced] - first_step
    return rollout, _Timed(_between(model, int(steps.min()) - 1, int(steps.max())), seconds)


def _decode_plain(engine: Engine, model: BenchModel, script: Script, prompt: Sequence[int]) -> _Timed:
    """As many tokens in one sequence; its phase are those that stand where the branches do."""
    model.restart_clock()
    params = SamplingParams(script.sampled_tokens, temperature=0.0, branching=False, ignore_eos=True)
    began = time.perf_counter()
    engine.generate([prompt], params)
    seconds = time.perf_counter() - began
    last_of_trunk = script.trunk_tokens - 1
    tokens = script.branches * script.branch_tokens
    return _Timed(_between(model, last_of_trunk, last_of_trunk + tokens), seconds)


def _between(model: BenchModel, earlier: int, later: int) -> float:
    """Seconds from the end of one forward to that of another: everything that the engine does lies in between."""
    return model.forward_ends[later] - model.forward_ends[earlier]
