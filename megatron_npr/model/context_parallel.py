"""Context parallelism over contiguous shards of a row: every rank fetches the earlier keys and values that its queries see.

    layout of the row, which every rank has ──► KeyExchange (pure: who sends which rows) ──► fetch_rows (all-to-all)

Megatron's own context parallelism (zigzag shards, ring of all keys) knows causal masks only; with branches most of what it
sends would be hidden. Queries never move. No rank asks another what it needs: the layout tells.

Shape legend: S tokens of a shard, F fetched rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npr_ext import BranchLayout
from npr_ext.errors import UserError
from npr_ext.layout.shard import LayoutShard, keys_needed, shard_of


@dataclass(frozen=True)
class KeyExchange:
    """What one rank sends and receives for a row.

    Attributes:
        shard: its tokens, the rows that it fetches, and the layout of both.
        send_rows: int64, rows of its own shard in the order of their destinations.
        send_counts, receive_counts: rows for and from each rank.
    """

    shard: LayoutShard
    send_rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


def shard_bounds(num_tokens: int, rank: int, size: int) -> tuple[int, int]:
    """[begin, end) of a rank's contiguous, equal share of a row."""
    if num_tokens % size:
        raise UserError(
            f"parallel.cp {size} does not divide a row of {num_tokens} tokens: choose a power of two"
        )
    share = num_tokens // size
    return rank * share, (rank + 1) * share


def plan_key_exchange(layout: BranchLayout, rank: int, size: int) -> KeyExchange:
    """The exchange of a row among `size` ranks, as rank `rank` takes part in it."""
    bounds = [shard_bounds(layout.num_tokens, each, size) for each in range(size)]
    begin, end = bounds[rank]
    shard = shard_of(layout, begin, end)
    nothing = shard.fetched.new_empty(0)
    sends = []
    for other_begin, other_end in bounds:
        wanted = keys_needed(layout, other_begin, other_end) if other_begin >= end else nothing
        sends.append(wanted[(wanted >= begin) & (wanted < end)] - begin)
    owners = torch.bucketize(
        shard.fetched, torch.tensor([last for _, last in bounds], device=shard.fetched.device), right=True
    )
    return KeyExchange(
        shard,
        torch.cat(sends),
        tuple(len(rows) for rows in sends),
        tuple(torch.bincount(owners, minlength=size).tolist()),
    )


def fetch_rows(rows_SC: Tensor, exchange: KeyExchange, group: dist.ProcessGroup) -> Tensor:
    """[first_query + S, C]: fetched rows, zeros up to a whole tile, own rows. Collective over `group`, differentiable."""
    fetched: Tensor = _FetchRows.apply(rows_SC, exchange, group)
    return fetched


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SC: Tensor, exchange: KeyExchange, group: dist.ProcessGroup) -> Tensor:
        ctx.exchange, ctx.group = exchange, group
        first_query = exchange.shard.layout.first_query
        num_fetched = len(exchange.shard.fetched)
        result = rows_SC.new_empty(first_query + len(rows_SC), rows_SC.shape[1])
        dist.all_to_all_single(
            result[:num_fetched],
            rows_SC[exchange.send_rows],
            list(exchange.receive_counts),
            list(exchange.send_counts),
            group=group,
        )
        result[num_fetched:first_query] = 0
        result[first_query:] = rows_SC
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        exchange: KeyExchange = ctx.exchange
        gradient = gradients[0]
        returned = gradient.new_empty(len(exchange.send_rows), gradient.shape[1])
        dist.all_to_all_single(
            returned,
            gradient[: len(exchange.shard.fetched)].contiguous(),
            list(exchange.send_counts),
            list(exchange.receive_counts),
            group=ctx.group,
        )
        own = gradient[exchange.shard.layout.first_query :].clone()
        return own.index_add_(0, exchange.send_rows, returned), None, None
