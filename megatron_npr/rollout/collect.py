"""Rollouts of one round over all engines.

    turns x samples ──► this engine's share ──► Backend.generate ──► gathered in the order asked for, on every rank

A rollout is (pass, row of the problem, try, sample): its name, and with the run's seed its draws, which do not depend on the
number of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_npr.config import RolloutSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.data.rounds import Turn
from megatron_npr.data.seeds import derive_seed
from megatron_npr.monitoring.spans import span
from megatron_npr.rl.agreement import segments_of
from megatron_npr.rollout.engine_groups import EngineShare
from megatron_npr.runtime.process_world import World
from npr_engine.backend import Backend
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.branching import is_error


def sampling_params(settings: RolloutSettings, seed: int) -> SamplingParams:
    """The engine's sampling parameters of one response."""
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        max_tokens=settings.max_tokens,
        max_branches=settings.max_branches,
        max_blocks=settings.max_blocks,
        branching=settings.branching,
        seed=seed,
    )


@span("rollout")
def collect(
    engine: Backend,
    world: World,
    turns: Sequence[Turn],
    settings: RolloutSettings,
    *,
    identity: tuple[int | str, ...],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Rollout]]:
    """`settings.samples_per_prompt` rollouts for each turn, [turn][sample], the same list on every rank.

    Raises:
        FloatingPointError: a response that ended with an error; on every rank alike.
    """
    engines = EngineShare.of(world, settings)
    requests = [
        (index, sample) for index in engines.own(len(turns)) for sample in range(settings.samples_per_prompt)
    ]
    names = [(*turns[index].identity, sample) for index, sample in requests]
    generated = engine.generate(
        [turns[index].prompt.prompt_ids for index, _ in requests],
        [sampling_params(settings, derive_seed(*identity, *name)) for name in names],
        request_ids=["/".join(map(str, name)) for name in names],
        on_progress=on_progress,
    )
    share = list(zip(requests, generated, strict=True))
    if world.size > 1:
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, share if engines.speaks else [])
        share = [item for part in gathered for item in part]
    failed = [rollout for _, rollout in share if is_error(rollout.finish_reason)]
    if failed:  # nobody should train on, or report, what such weights say
        raise FloatingPointError(
            f"{len(failed)} of {len(share)} responses failed: {failed[0].request_id} with {failed[0].finish_reason}"
        )
    found = dict(share)
    return [
        [found[index, sample] for sample in range(settings.samples_per_prompt)] for index in range(len(turns))
    ]


def train_sample(rollout: Rollout, advantage: float, *, train_forced: bool = False) -> TrainSample:
    """A rollout as it is trained on: the very tokens and log-probs of the engine; forced tokens carry no loss by default."""
    loss_mask = np.ones_like(rollout.forced) if train_forced else ~rollout.forced
    return TrainSample(
        prompt_ids=rollout.prompt_ids,
        response_ids=rollout.token_ids,
        loss_mask=loss_mask,
        old_log_probs=np.nan_to_num(rollout.logprobs, nan=0.0),
        advantage=advantage,
        segments=segments_of(rollout.branch_ids, rollout.forced),
    )
