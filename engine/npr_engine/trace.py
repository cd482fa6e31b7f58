"""Proof of genuine parallelism from rollouts alone: which (request, branch) produced a token in which engine step.

Nothing here knows the scheduler. A rollout's `branch_ids` cut it into trunk and blocks of branches; its
`decode_steps` must then respect fork and join, and show siblings decoding in the same steps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npr_engine.rollout import Rollout

STEP_MICROSECONDS = 1000


@dataclass(frozen=True)
class Unit:
    """Tokens start..end-1 of a rollout that stand in one branch (0: trunk)."""

    branch: int
    start: int
    end: int


@dataclass(frozen=True)
class Execution:
    """What the trace of one rollout shows.

    Attributes:
        faults: violations of fork and join order, and siblings that never decoded beside another, in words;
        empty if it is sound.
        parallel_blocks: blocks of >= 2 branches that have a step in which all of them decoded.
        blocks: all blocks.
        ideal_steps: sampled tokens on the longest path.
        real_steps: engine steps from the first to the last sampled token.
        sampled: sampled tokens.
    """

    faults: tuple[str, ...]
    parallel_blocks: int
    blocks: int
    ideal_steps: int
    real_steps: int
    sampled: int

    @property
    def concurrency(self) -> float:
        """Sampled tokens per step."""
        return self.sampled / max(self.real_steps, 1)

    @property
    def parallel_efficiency(self) -> float:
        return self.ideal_steps / max(self.real_steps, 1)


def examine(rollout: Rollout) -> Execution:
    """Checks a rollout's trace and measures it."""
    units = list(_units(rollout))
    blocks = list(_blocks(units))
    steps = [[_sampled_steps(rollout, branch) for branch in block] for block in blocks]
    inside = [len(branch) for block in steps for branch in block]
    sampled = rollout.decode_steps[~rollout.forced]
    return Execution(
        faults=(*_faults(rollout, units), *_lonely_siblings(blocks, steps)),
        parallel_blocks=sum(len(block) > 1 and _all_at_once(block) for block in steps),
        blocks=len(blocks),
        ideal_steps=len(sampled) - sum(inside) + sum(max(map(len, block)) for block in steps),
        real_steps=int(sampled.max() - sampled.min()) + 1 if len(sampled) else 0,
        sampled=len(sampled),
    )


def ran_in_parallel(rollout: Rollout) -> bool:
    """Whether the trace is sound and has a block of >= 2 branches that all decoded in the same steps."""
    execution = examine(rollout)
    return not execution.faults and execution.parallel_blocks > 0


def write_chrome_trace(path: Path, rollouts: Sequence[Rollout], piece: Callable[[int], str] = str) -> None:
    """Writes a trace that Perfetto and chrome://tracing open: a process per request, a thread per branch, a slice
    per token (forced ones of a step share it), a millisecond per engine step. `piece` gives the text of a token."""
    events: list[dict[str, object]] = []
    for process, rollout in enumerate(rollouts):
        _name(events, "process_name", process, 0, f"request {rollout.request_id} ({rollout.finish_reason})")
        for branch in np.unique(rollout.branch_ids).tolist():
            _name(events, "thread_name", process, branch, f"branch {branch}" if branch else "trunk")
        events += _slices(rollout, process, piece)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _name(events: list[dict[str, object]], kind: str, process: int, thread: int, name: str) -> None:
    events.append({"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}})


def _slices(rollout: Rollout, process: int, piece: Callable[[int], str]) -> Iterator[dict[str, object]]:
    """One slice per (step, branch): several tokens where the engine forced some in that step."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, place in enumerate(
        zip(rollout.decode_steps.tolist(), rollout.branch_ids.tolist(), strict=True)
    ):
        groups.setdefault(place, []).append(index)
    for (step, branch), indices in groups.items():
        forced = [index for index in indices if rollout.forced[index]]
        yield {
            "ph": "X",
            "name": "".join(piece(int(rollout.token_ids[index])) for index in indices),
            "cat": "forced" if len(forced) == len(indices) else "sampled",
            "pid": process,
            "tid": branch,
            "ts": step * STEP_MICROSECONDS,
            "dur": STEP_MICROSECONDS,
            "args": {"step": step, "tokens": len(indices), "forced": len(forced)},
        }


def _units(rollout: Rollout) -> Iterator[Unit]:
    ids = rollout.branch_ids
    cuts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
    for start, end in pairwise(cuts):
        if start < end:
            yield Unit(int(ids[start]), start, end)


def _blocks(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Branches between two pieces of trunk."""
    block: list[Unit] = []
    for unit in units:
        if unit.branch:
            block.append(unit)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _sampled_steps(rollout: Rollout, unit: Unit) -> NDArray[np.int32]:
    part = slice(unit.start, unit.end)
    return rollout.decode_steps[part][~rollout.forced[part]]


def _all_at_once(branches: Sequence[NDArray[np.int32]]) -> bool:
    """Whether there is a step in which all branches sampled a token."""
    common = set(branches[0].tolist())
    for steps in branches[1:]:
        common &= set(steps.tolist())
    return bool(common)


def _faults(rollout: Rollout, units: Sequence[Unit]) -> Iterator[str]:
    """Where order is broken: a sampled token needs a step of its own after everything that it sees."""
    fork = -1  # the last trunk token so far
    ends: list[int] = []  # last tokens of the open block's branches
    for unit in units:
        if unit.branch == 0:
            for end in ends:
                yield from _ordered(rollout, end, unit.start, "join")
            ends, fork = [], unit.end - 1
        else:
            if unit.branch != len(ends) + 1:
                yield f"token {unit.start}: branch {unit.branch} stands after {len(ends)} branches"
            if fork < 0:
                yield f"token {unit.start}: a branch without a trunk before it"
            else:
                yield from _ordered(rollout, fork, unit.start, "fork")
            ends.append(unit.end - 1)
        yield from _ordered_inside(rollout, unit)


def _lonely_siblings(
    blocks: Sequence[Sequence[Unit]], steps: Sequence[Sequence[NDArray[np.int32]]]
) -> Iterator[str]:
    """Branches that share no step with any sibling: decoded one after the other. A branch without a sampled
    token (the response ended as it opened) proves nothing and is left out."""
    for block, taken in zip(blocks, steps, strict=True):
        sampled = [
            (unit, set(branch.tolist())) for unit, branch in zip(block, taken, strict=True) if len(branch)
        ]
        branches_in = Counter(step for _, own in sampled for step in own)
        for unit, own in sampled:
            if len(sampled) > 1 and all(branches_in[step] == 1 for step in own):
                yield (
                    f"siblings at token {unit.start}: branch {unit.branch} of {len(block)} decoded in steps"
                    f" {min(own)}..{max(own)}, none of them together with a sibling"
                )


def _ordered(rollout: Rollout, earlier: int, later: int, what: str) -> Iterator[str]:
    first, second = int(rollout.decode_steps[earlier]), int(rollout.decode_steps[later])
    if second <= first:
        yield f"{what} at token {later}: step {second} is not after step {first} of token {earlier}"


def _ordered_inside(rollout: Rollout, unit: Unit) -> Iterator[str]:
    """Within a branch steps rise; tokens after forced ones may share their step."""
    part = slice(unit.start, unit.end)
    steps, forced = rollout.decode_steps[part], rollout.forced[part]
    rising = steps[1:] - steps[:-1]
    for offset in np.flatnonzero(rising < np.where(forced[:-1], 0, 1)).tolist():
        index = unit.start + offset + 1
        yield f"token {index}: step {steps[offset + 1]} does not follow step {steps[offset]}"
