"""Rows to data-parallel ranks by attended pairs: all rows are equally long, so what differs is their attention.

TrainSample* ──► attended_pairs ──┐
RowPlan* ─────────────────────────┴► row_pairs ──► share_rows ──► rows of every rank, the same on every rank
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_npr.data.packing import RowPlan, TrainSample
from npr_ext import TagIds, branch_layout


@dataclass(frozen=True)
class Shares:
    """Indices of the rows of each rank, costly ones first; `imbalance`: the largest load over the mean (1 is best)."""

    rows: tuple[tuple[int, ...], ...]
    imbalance: float


def attended_pairs(sample: TrainSample, tags: TagIds, *, branching: bool) -> int:
    """(query, key) pairs of a sample that stands alone, its prompt's own included."""
    token_ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]))
    layout = branch_layout(token_ids, tags=tags, prompt_lengths=len(sample.prompt_ids), branching=branching)
    return layout.visible_pairs()


def row_pairs(plan: RowPlan, samples: Sequence[TrainSample], pairs: Sequence[int], *, length: int) -> int:
    """Pairs of a packed row of `length` tokens: the prompt that a group shares counts once, padding sees itself."""
    total = length - plan.num_tokens
    for group in plan.groups:
        prompt = len(samples[group[0]].prompt_ids)
        total += sum(pairs[index] for index in group) - (len(group) - 1) * prompt * (prompt + 1) // 2
    return total


def share_rows(costs: Sequence[int], num_ranks: int) -> Shares:
    """Longest processing time first, no rank with more than its count of rows; never worse than dealing rows in turn."""
    order = sorted(range(len(costs)), key=lambda row: -costs[row])  # stable: deterministic
    in_turn = [_costly_first(range(rank, len(costs), num_ranks), costs) for rank in range(num_ranks)]
    room = -(-len(costs) // num_ranks)
    heap = [(0, rank) for rank in range(num_ranks)]
    placed: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in order:
        load, rank = heapq.heappop(heap)
        placed[rank].append(row)
        if len(placed[rank]) < room:
            heapq.heappush(heap, (load + costs[row], rank))
    best = min((placed, in_turn), key=lambda rows: _imbalance(rows, costs))
    return Shares(tuple(tuple(rows) for rows in best), _imbalance(best, costs))


def _costly_first(rows: Sequence[int], costs: Sequence[int]) -> list[int]:
    """Costly rows first: ranks that run micro-batches side by side then run similar ones."""
    return sorted(rows, key=lambda row: -costs[row])


def _imbalance(shares: Sequence[Sequence[int]], costs: Sequence[int]) -> float:
    loads = [sum(costs[row] for row in rows) for rows in shares]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0
