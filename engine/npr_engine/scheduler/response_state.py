"""A response while it is decoded: trunk, blocks of branches, and the work that waits for the next step."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from npr_engine.kvcache.prompt_cache import PromptKV
from npr_engine.language.constraint import Phase
from npr_engine.language.parser import Parser, State
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.rows import Rows

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Request:
    """What a user asks for: `prompt_ids` int32 [P], P >= 1."""

    request_id: str
    prompt_ids: NDArray[np.int32]
    params: SamplingParams

    @property
    def key(self) -> int:
        """64 bits that name the request to the sampler: a digest of its seed and id, so reruns are exact."""
        name = self.request_id if self.params.sample_id is None else self.params.sample_id
        digest = hashlib.blake2b(f"{self.params.seed}/{name}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class Record:
    """Tokens of a branch and what belongs to each, [n]; taken from its row. `steps` are engine steps."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampler_logprobs: NDArray[np.float32]
    steps: NDArray[np.int32]
    positions: NDArray[np.int32]
    forced: NDArray[np.bool_]

    @classmethod
    def given(cls, tokens: Sequence[int], position: int, step: int) -> Record:
        """Tokens that nobody sampled, at positions from `position` on."""
        count = len(tokens)
        nothing = np.full(count, np.nan, np.float32)
        positions = np.arange(position, position + count, dtype=np.int32)
        steps, forced = np.full(count, step, np.int32), np.ones(count, np.bool_)
        return cls(np.asarray(tokens, np.int32), nothing, nothing, steps, positions, forced)

    @classmethod
    def joined(cls, records: Sequence[Record]) -> Record:
        """One record after the other."""
        return cls(
            np.concatenate([record.tokens for record in records]),
            np.concatenate([record.logprobs for record in records]),
            np.concatenate([record.sampler_logprobs for record in records]),
            np.concatenate([record.steps for record in records]),
            np.concatenate([record.positions for record in records]),
            np.concatenate([record.forced for record in records]),
        )

    @classmethod
    def take(cls, rows: Rows, row: int, start: int = 0) -> Record:
        """A copy of the tokens of row `row`, from its token `start` on."""
        end = int(rows.num_tokens[row])
        return cls(
            rows.tokens[row, start:end].copy(),
            rows.logprobs[row, start:end].copy(),
            rows.sampler_logprobs[row, start:end].copy(),
            rows.steps[row, start:end].copy(),
            rows.positions[row, start:end].copy(),
            rows.forced[row, start:end].copy(),
        )

    def append_to(self, rows: Rows, row: int) -> None:
        """Writes the record behind the tokens of row `row`."""
        start = int(rows.num_tokens[row])
        end = start + len(self.tokens)
        rows.need_capacity(end)
        rows.tokens[row, start:end], rows.logprobs[row, start:end] = self.tokens, self.logprobs
        rows.sampler_logprobs[row, start:end], rows.steps[row, start:end] = self.sampler_logprobs, self.steps
        rows.positions[row, start:end], rows.forced[row, start:end] = self.positions, self.forced
        rows.num_tokens[row] = end

    def part(self, start: int, end: int) -> Record:
        """Tokens start..end-1."""
        return Record(
            self.tokens[start:end],
            self.logprobs[start:end],
            self.sampler_logprobs[start:end],
            self.steps[start:end],
            self.positions[start:end],
            self.forced[start:end],
        )

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(eq=False)
class Branch:
    """The trunk (number 0) or branch `number` of a block. On a row while it runs, else in a record. The first
    `num_streamed` of its tokens have gone out as events."""

    number: int
    key: int
    row: int = -1
    record: Record | None = None
    closed: bool = False
    step_start: int = -1
    state: State = State.TRUNK
    phase: Phase = Phase.EMPTY
    num_streamed: int = 0


@dataclass(eq=False)
class Fork:
    """A block: it opens after the first `trunk_tokens` tokens of the trunk's row; `open` branches have not closed."""

    trunk_tokens: int
    branches: list[Branch]
    open: int


@dataclass(frozen=True)
class Feed:
    """Compute the KV of the branch's tokens before `until` (None: of all that it has)."""

    branch: Branch
    until: int | None


@dataclass(frozen=True)
class Resume:
    """Compute the KV of all tokens of these branches and sample after each, in one engine step: siblings stay
    in lock-step, so what a response is when it ends early does not depend on the batch."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Open:
    """Give the branches of a fork rows that alias the trunk's slots."""

    fork: Fork


@dataclass(frozen=True)
class Join:
    """Hand the slots of all branches to the trunk."""

    fork: Fork


Work: TypeAlias = Feed | Resume | Open | Join


@dataclass(eq=False)
class ResponseState:
    """A response in the engine.

    Attributes:
        arrival: submission order; smaller is served first and preempted last.
        tokens_left: what its budget leaves while it has no request slot.
        request_slot: its index in RequestSlots while it runs, else -1.
        blocks: KV blocks it owns; `spare` are slots of them that no row has.
        work: what the next step has to do, in order of dependence; steady decoding is not in it.
        parsed: tokens of the trunk's row that the parser has seen.
    """

    request: Request
    arrival: int
    parser: Parser
    trunk: Branch
    tokens_left: int
    forks: list[Fork] = field(default_factory=list)
    request_slot: int = -1
    prompt: PromptKV | None = None
    blocks: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    work: deque[Work] = field(default_factory=deque)
    parsed: int = 1
    preemptions: int = 0

    @property
    def prefix_ids(self) -> NDArray[np.int32]:
        """The prompt without its last token, whose KV is shared."""
        return self.request.prompt_ids[:-1]

    def branches_on_rows(self) -> list[Branch]:
        """The trunk and the branches that have a row, in packed order."""
        branches = [branch for fork in self.forks for branch in fork.branches]
        return [branch for branch in (self.trunk, *branches) if branch.row >= 0]

    def all_work(self) -> deque[Work]:
        """The work that brings a response without any KV to where its tokens are."""
        work: deque[Work] = deque()
        for fork in self.forks:
            work.append(Feed(self.trunk, fork.trunk_tokens))
            work.append(Open(fork))
            work.extend(Feed(branch, None) for branch in fork.branches if branch.closed)
            work.append(Resume(tuple(branch for branch in fork.branches if not branch.closed)))
            if fork.open == 0:
                work[-1] = Join(fork)
        if not self.forks or self.forks[-1].open == 0:
            work.append(Resume((self.trunk,)))
        return work

    def packed(self) -> tuple[Record, NDArray[np.int32]]:
        """Everything decoded so far in packed order, and branch ids int32 [R]; the response has no rows."""
        trunk = self.trunk.record
        assert trunk is not None
        parts: list[tuple[Record, int]] = []
        start = 1  # the last token of the prompt
        for fork in self.forks:
            parts.append((trunk.part(start, fork.trunk_tokens), 0))
            parts += [(branch.record, branch.number) for branch in fork.branches if branch.record is not None]
            start = fork.trunk_tokens
        parts.append((trunk.part(start, len(trunk)), 0))
        ids = np.repeat([number for _, number in parts], [len(record) for record, _ in parts])
        return Record.joined([record for record, _ in parts]), ids.astype(np.int32)


def branch_key(request_key: int, block: int, number: int) -> int:
    """64 bits that name branch `number` of block `block` to the sampler."""
    return mix64(request_key ^ mix64((block << 32) + number + 1))


def mix64(value: int) -> int:
    """The finaliser of splitmix64 (https://prng.di.unimi.it/splitmix64.c)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
