"""Logits of the inference model over one sequence, as its engine would feed it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npr_engine.model.transformer import InferenceModel, KVCache, Step


def step(token_ids: Tensor, start: int, length: int) -> Step:
    """Tokens [start, start + length) of one sequence in slots of its own order, all sampled."""
    places = torch.arange(start, start + length, dtype=torch.int32)
    return Step(
        token_ids=token_ids[start : start + length].int(),
        positions=places,
        slots=places,
        rows=torch.zeros_like(places),
        lengths=places + 1,
        block_tables=torch.arange(len(token_ids), dtype=torch.int32)[None],
        sample_index=torch.arange(length),
    )


def engine_logits(model: InferenceModel, token_ids: Tensor) -> Tensor:
    """A prefill in two chunks, then the last tokens one by one."""
    cache: KVCache = model.new_cache(len(token_ids))
    chunks = [11, len(token_ids) - 11 - 5, 1, 1, 1, 1, 1]
    starts = np.cumsum([0, *chunks[:-1]])
    with torch.inference_mode():
        return torch.cat(
            [model.forward(step(token_ids, int(a), n), cache) for a, n in zip(starts, chunks, strict=True)]
        )
