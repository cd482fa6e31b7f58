"""The wall-clock worth of branching: the same weights decode the same amount of text with and without branches.

prompts ─► decoded with branches ─► as many tokens for each in one plain sequence ─► (alternating, medians) ─► Speedup
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_npr.config import RolloutSettings
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.data.seeds import derive_seed
from megatron_npr.rollout.collect import sampling_params
from npr_engine.backend import Backend
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams


@dataclass(frozen=True)
class Speedup:
    """Medians over repeats; `ideal` is total / critical-path tokens of the very responses that were timed, `steps` how many
    times fewer engine steps they took with branches."""

    batch: int
    wall: float
    steps: float
    ideal: float
    parallel_seconds: float
    sequential_seconds: float


def measure(
    engine: Backend,
    prompts: Sequence[EncodedProblem],
    settings: RolloutSettings,
    *,
    batch: int,
    repeats: int,
    seed: int,
) -> Speedup:
    """Decode the prompts `batch` at a time, first with branches, then equally long without; the first repeat warms up."""
    walls, fewer, ideals, with_branches, without = [], [], [], [], []
    for repeat in range(repeats + 1):
        parallel = sequential = 0.0
        rollouts: list[Rollout] = []
        parallel_steps = sequential_steps = 0
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            began = time.perf_counter()
            decoded = _decode(
                engine, part, [sampling_params(settings, derive_seed(seed, "speed", repeat))] * len(part)
            )
            middle = time.perf_counter()
            plain = _decode(engine, part, [_plain(rollout.num_tokens, seed) for rollout in decoded])
            parallel += middle - began
            sequential += time.perf_counter() - middle
            rollouts += decoded
            parallel_steps += engine_steps(decoded)
            sequential_steps += engine_steps(plain)
        if repeat:
            walls.append(sequential / parallel)
            fewer.append(sequential_steps / parallel_steps)
            ideals.append(sum(r.num_tokens for r in rollouts) / sum(r.critical_path for r in rollouts))
            with_branches.append(parallel)
            without.append(sequential)
    return Speedup(
        batch,
        statistics.median(walls),
        statistics.median(fewer),
        statistics.median(ideals),
        statistics.median(with_branches),
        statistics.median(without),
    )


def engine_steps(rollouts: Sequence[Rollout]) -> int:
    """Engine steps in which these responses, decoded in one call, got a token."""
    return len(np.unique(np.concatenate([rollout.decode_steps for rollout in rollouts])))


def _plain(num_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, branching=False, ignore_eos=True, seed=seed)


def _decode(
    engine: Backend, prompts: Sequence[EncodedProblem], sampling: list[SamplingParams]
) -> list[Rollout]:
    return engine.generate([prompt.prompt_ids for prompt in prompts], sampling)
