"""Tokens as they come to be: what a step has added to each branch that decoded in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npr_engine.scheduler.response_state import Branch, Record, ResponseState
from npr_engine.scheduler.rows import Rows


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one branch of one request, in order.

    Forced tokens come with the token that is sampled after them, so an event follows everything that its tokens
    see: the trunk before a fork, then its branches (of one step in any order), then the trunk after the join.

    Attributes:
        branch_id: 0 for the trunk, i for branch i of the block that is open.
        token_ids: int32 [n].
        forced: bool [n], written by the engine.
        logprobs: float32 [n] under the policy; NaN where forced.
    """

    request_id: str
    branch_id: int
    token_ids: NDArray[np.int32]
    forced: NDArray[np.bool_]
    logprobs: NDArray[np.float32]


def new_events(rows: Rows, sampled: Iterable[tuple[ResponseState, Branch]]) -> Iterator[TokenEvent]:
    """The tokens of the branches that an engine step sampled which have not been streamed; of a response that
    has ended, all that are left."""
    ended: dict[int, ResponseState] = {}
    for response, branch in sampled:
        if response.request_slot >= 0:
            yield from _unstreamed(rows, response, branch)
        else:
            ended[response.arrival] = response
    for response in ended.values():
        yield from last_events(rows, response)


def last_events(rows: Rows, response: ResponseState) -> Iterator[TokenEvent]:
    """The tokens of a response that has ended which have not been streamed."""
    last = response.forks[-1].branches if response.forks else []
    for branch in (*last, response.trunk):
        yield from _unstreamed(rows, response, branch)


def _unstreamed(rows: Rows, response: ResponseState, branch: Branch) -> Iterator[TokenEvent]:
    record = branch.record if branch.row < 0 else Record.take(rows, branch.row, branch.num_streamed)
    assert record is not None
    if branch.row < 0:
        record = record.part(branch.num_streamed, len(record))
    branch.num_streamed += len(record)
    if len(record):
        yield TokenEvent(
            response.request.request_id, branch.number, record.tokens, record.forced, record.logprobs
        )
