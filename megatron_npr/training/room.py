"""Whether the longest prompt with the longest response has room: in the KV cache, in a row, in the model's context.

Asked once, before the first step, in terms of the keys that the command has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_npr.config import BatchSettings, DataSettings, EvalSettings, RolloutSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.hf.huggingface import read_context_length
from megatron_npr.training.session import Session
from npr_engine.kvcache.block_pool import slots_needed
from npr_ext.errors import UserError


def check_rollout_room(
    session: Session,
    prompts: Sequence[EncodedProblem],
    source: DataSettings | EvalSettings,
    rollout: RolloutSettings,
    batch: BatchSettings | None = None,
) -> None:
    """UserError unless every response to these prompts fits the engine and, where it is trained, a row of `batch`.

    Behind the model's context it may go: that is a warning.
    """
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    total = longest + rollout.max_tokens
    what = f"the longest prompt ({longest} tokens) and rollout.max_tokens {rollout.max_tokens}"
    otherwise = f"or lower rollout.max_tokens or {source.table}.max_prompt_tokens"
    need = slots_needed(longest, rollout.max_tokens, rollout.block_size)
    slots = rollout.kv_slots // rollout.block_size * rollout.block_size
    if need > slots:
        raise UserError(
            f"{what} need {need} KV slots: raise rollout.kv_slots from {rollout.kv_slots}, {otherwise}"
        )
    if batch is not None and total > batch.micro_batch_tokens:
        raise UserError(
            f"{what} make {total} tokens of a row: raise batch.micro_batch_tokens from {batch.micro_batch_tokens}, {otherwise}"
        )
    _warn_beyond_context(session, total, what)


def check_sample_room(
    session: Session, samples: Sequence[TrainSample], data: Path, batch: BatchSettings
) -> None:
    """UserError unless every sample of the file fits a row."""
    longest = max(sample.num_tokens for sample in samples)
    what = f"the longest sample of {data} ({longest} tokens)"
    if longest > batch.micro_batch_tokens:
        raise UserError(
            f"{what} does not fit a row: raise batch.micro_batch_tokens from {batch.micro_batch_tokens}, or leave it out"
        )
    _warn_beyond_context(session, longest, what)


def _warn_beyond_context(session: Session, num_tokens: int, what: str) -> None:
    if not session.world.is_main:
        return
    context = read_context_length(session.model.path)
    if context is not None and num_tokens > context:
        print(
            f"npr: warning: {what} may reach position {num_tokens}, the model's context ends at {context} "
            "(max_position_embeddings in its config.json): what it writes behind may be poor",
            file=sys.stderr,
            flush=True,
        )
