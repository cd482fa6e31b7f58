"""`npr bench layout`: what it costs to lay out tokens.

random_layout x sequences ─► branch_layout (time, memory) ─► block mask ─► beside a naive dense mask at <= 8k tokens
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_npr.bench.timing import median_seconds, peak_bytes
from npr_ext import BranchLayout, branch_layout
from npr_ext.testing import RandomLayout, random_layout

SIZES = ((1, 1 << 10), (1, 1 << 13), (1, 1 << 15), (1, 1 << 18), (1, 1 << 20), (1, 1 << 22), (64, 1 << 15))
"""(sequences, tokens of each)."""

LONGEST_BLOCK_MASK = 1 << 15
LONGEST_DENSE = 1 << 13


@dataclass(frozen=True)
class LayoutCost:
    """Cost of the layout of `sequences` packed sequences, `tokens` in all; None where a size is not measured."""

    tokens: int
    sequences: int
    seconds: float
    ns_per_token: float
    extra_bytes_per_token: float
    block_mask_seconds: float | None
    dense_reference_seconds: float | None


def measure() -> dict[str, object]:
    """Every size, and the exponent of time over tokens for one sequence."""
    costs = [cost_of(sequences, length) for sequences, length in SIZES]
    single = [cost for cost in costs if cost.sequences == 1]
    return {
        "threads": torch.get_num_threads(),
        "exponent": exponent([(cost.tokens, cost.seconds) for cost in single]),
        "sizes": [asdict(cost) for cost in costs],
    }


def cost_of(sequences: int, length: int) -> LayoutCost:
    """Time and memory at one size."""
    lay_out = prepare(sequences, length)
    seconds = median_seconds(lay_out)
    tokens = sequences * length
    layout = lay_out()
    return LayoutCost(
        tokens=tokens,
        sequences=sequences,
        seconds=seconds,
        ns_per_token=1e9 * seconds / tokens,
        extra_bytes_per_token=peak_bytes(functools.partial(prepare, sequences, length)) / tokens,
        block_mask_seconds=median_seconds(layout.block_mask) if tokens <= LONGEST_BLOCK_MASK else None,
        dense_reference_seconds=(
            median_seconds(functools.partial(dense_mask, random_layout(0, length)), repeats=1)
            if tokens <= LONGEST_DENSE
            else None
        ),
    )


def prepare(sequences: int, length: int) -> Callable[[], BranchLayout]:
    """Lays out the standard case, packed; the operators are loaded and warm."""
    sample = random_layout(0, length)
    ids = sample.token_ids.repeat(sequences)
    prompt_lengths = torch.full((sequences,), sample.prompt_length)
    bounds = torch.arange(sequences + 1) * length
    random_layout(0, 1024).layout()
    return functools.partial(
        branch_layout, ids, tags=sample.tags, prompt_lengths=prompt_lengths, cu_seqlens=bounds
    )


def dense_mask(sample: RandomLayout) -> Tensor:
    """bool [T, T] the naive way: causal, then for every pair of sibling branches a rectangle is cut out."""
    layout = sample.layout()
    mask = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool).tril()
    branch_ids, joins = layout.branch_ids.tolist(), layout.hidden_until.tolist()
    spans: dict[tuple[int, int], list[int]] = {}
    for token, (branch, join) in enumerate(zip(branch_ids, joins, strict=True)):
        if branch:
            spans.setdefault((join, branch), []).append(token)
    for (join, branch), tokens in spans.items():
        for (other_join, other), others in spans.items():
            if join == other_join and branch != other:
                mask[tokens[0] : tokens[-1] + 1, others[0] : others[-1] + 1] = False
    return mask


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log seconds over log tokens, least squares."""
    xs, ys = [math.log(tokens) for tokens, _ in points], [math.log(seconds) for _, seconds in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)
