"""Samples into packed rows: the one place where sequences meet the token budget.

    TrainSample* ──► plan_rows (pure, lengths only) ──► pack_row ──► PackedRow (token ids, int32 [5, T] layout, targets)

With `share_prompts` the samples of one prompt stand behind ONE copy of it (`parent` in cuda_ext/README.md): a group of 16
pays for its prompt once, in attention and in every GEMM.

Shape legend: P prompt, R response, T tokens of a row (a multiple of `ROW_MULTIPLE`), M trained tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npr_ext import BranchLayout, TagIds, branch_layout
from npr_ext.errors import UserError
from npr_ext.layout.branch_layout import TILE, bucket_length

ROW_MULTIPLE = 64
NO_SEGMENT = -1


@dataclass(frozen=True)
class TrainSample:
    """One response to train on, in packed order, as the engine (or the SFT encoder) produced it; never re-tokenised.

    prompt_ids int32 [P]; response_ids int32 [R]; loss_mask bool [R] (False: forced or otherwise without loss);
    old_log_probs float32 [R] (of the policy that sampled; zeros where unused); advantage: one scalar a response;
    segments int8 [R]: an `rl.agreement.Segment` of each token that the engine sampled, None for a response of other origin.
    """

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    old_log_probs: NDArray[np.float32]
    advantage: float = 0.0
    segments: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        assert len(self.response_ids) == len(self.loss_mask) == len(self.old_log_probs), (
            f"response of {len(self.response_ids)} tokens with {len(self.loss_mask)} flags "
            f"and {len(self.old_log_probs)} log-probs"
        )
        assert len(self.prompt_ids) > 0, (
            "a sample needs a prompt: its first response token is predicted by it"
        )

    @classmethod
    def whole(
        cls, prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32], advantage: float = 0.0
    ) -> TrainSample:
        """A response that no engine sampled: every token is trained, and has no old log-prob."""
        count = len(response_ids)
        return cls(prompt_ids, response_ids, np.ones(count, np.bool_), np.zeros(count, np.float32), advantage)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch. token_ids int64 [1, T]; layout int32 [5, T]; the rest for the M trained tokens.

    targets int64 [M]: index in the row of each trained token that has a predecessor; segments int8 [M]: see TrainSample,
    NO_SEGMENT where there is none; sample_of int64 [M]: index of its sample in the list that was packed (-1 nowhere);
    within int64 [M]: its index in that response. in_response bool [T]: whether a token is one of a response, neither of a
    prompt nor padding.
    """

    token_ids: Tensor
    layout: Tensor
    in_response: Tensor
    targets: Tensor
    advantages: Tensor
    old_log_probs: Tensor
    segments: Tensor
    sample_of: Tensor
    within: Tensor
    num_real_tokens: int

    @property
    def num_targets(self) -> int:
        return int(self.targets.numel())

    def without_targets(self) -> PackedRow:
        """The row for a pass that wants no log-probs."""
        return self._at(slice(0))

    def with_predecessors_in(self, begin: int, end: int) -> PackedRow:
        """The row with those targets that are predicted from [begin, end): a context-parallel rank's share of the loss."""
        predecessors = BranchLayout.from_tensor(self.layout).predecessor[self.targets]
        return self._at((begin <= predecessors) & (predecessors < end))

    def _at(self, kept: Tensor | slice) -> PackedRow:
        """The row with some of its targets."""
        return replace(
            self,
            targets=self.targets[kept],
            advantages=self.advantages[kept],
            old_log_probs=self.old_log_probs[kept],
            segments=self.segments[kept],
            sample_of=self.sample_of[kept],
            within=self.within[kept],
        )


@dataclass(frozen=True)
class RankRows:
    """The rows of one rank in a step; `imbalance`: attended pairs of the busiest data-parallel rank over their mean."""

    rows: list[PackedRow]
    imbalance: float


@dataclass(frozen=True)
class RowPlan:
    """Groups of sample indices that stand in one row; each group is one prompt segment and its responses."""

    groups: tuple[tuple[int, ...], ...]
    num_tokens: int


def plan_rows(samples: Sequence[TrainSample], *, row_tokens: int, share_prompts: bool) -> list[RowPlan]:
    """Rows of at most `row_tokens` tokens, first fit by decreasing size; every sample in exactly one row.

    A group larger than a row is split; its prompt is then repeated in each part. Raises UserError for a sample that fits in
    no row.
    """
    units = _units(samples, row_tokens, share_prompts)
    units.sort(key=lambda unit: -unit[1])  # stable: ties stay in input order
    rows: list[list[tuple[int, ...]]] = []
    room: list[int] = []
    for members, size in units:
        home = next((index for index, free in enumerate(room) if free >= size), None)
        if home is None:
            rows.append([])
            room.append(row_tokens)
            home = len(rows) - 1
        rows[home].append(members)
        room[home] -= size
    return [RowPlan(tuple(groups), row_tokens - free) for groups, free in zip(rows, room, strict=True)]


def _units(
    samples: Sequence[TrainSample], row_tokens: int, share_prompts: bool
) -> list[tuple[tuple[int, ...], int]]:
    """Indivisible pieces (sample indices, tokens): the samples of one prompt, cut where they outgrow a row."""
    by_prompt: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.num_tokens > row_tokens:
            raise UserError(
                f"a sample of {sample.num_tokens} tokens does not fit a row of {row_tokens}: "
                "raise batch.micro_batch_tokens"
            )
        key: object = sample.prompt_ids.tobytes() if share_prompts else index
        by_prompt.setdefault(key, []).append(index)
    units: list[tuple[tuple[int, ...], int]] = []
    for members in by_prompt.values():
        prompt = len(samples[members[0]].prompt_ids)
        part: list[int] = []
        size = prompt
        for index in members:
            response = len(samples[index].response_ids)
            if part and size + response > row_tokens:
                units.append((tuple(part), size))
                part, size = [], prompt
            part.append(index)
            size += response
        units.append((tuple(part), size))
    return units


def row_length(plans: Sequence[RowPlan], bucket_of: int | None = None, *, multiple: int = 1) -> int:
    """T for all rows of a step (pipeline stages exchange equal shapes): the fullest row, rounded up.

    `bucket_of`: the largest row that may be; T is then one of few lengths below it, so that kernels which are compiled for a
    shape (FlexAttention on a GPU) are compiled seldom. `multiple`: T is one of it, whatever else it is.
    """
    length = max((plan.num_tokens for plan in plans), default=1)
    if bucket_of is not None:
        length = min(bucket_length(length), -(-bucket_of // TILE) * TILE)
    step = math.lcm(ROW_MULTIPLE, multiple)
    return -(-length // step) * step


def pack_row(
    samples: Sequence[TrainSample], plan: RowPlan, *, length: int, tags: TagIds, branching: bool, pad_id: int
) -> PackedRow:
    """Lay the planned groups out in one row of `length` tokens; pad tokens are sequences of their own."""
    builder = _RowBuilder()
    for group in plan.groups:
        builder.add_group(samples, group)
    num_real = builder.num_tokens
    builder.add_padding(length - num_real, pad_id)
    token_ids = torch.from_numpy(np.concatenate(builder.tokens))
    layout = branch_layout(
        token_ids,
        tags=tags,
        prompt_lengths=torch.tensor(builder.prompt_lengths, dtype=torch.int32),
        cu_seqlens=torch.tensor(np.cumsum([0, *builder.lengths]), dtype=torch.int32),
        parents=torch.tensor(builder.parents, dtype=torch.int32),
        branching=branching,
    )
    loss_mask = torch.from_numpy(np.concatenate(builder.loss_mask))
    sample_of = torch.from_numpy(np.concatenate(builder.sample_of))
    targets = torch.nonzero(loss_mask & (layout.predecessor >= 0))[:, 0]
    return PackedRow(
        token_ids=token_ids.long()[None, :],
        layout=layout.as_tensor(),
        in_response=sample_of >= 0,
        targets=targets,
        advantages=torch.from_numpy(np.concatenate(builder.advantages))[targets],
        old_log_probs=torch.from_numpy(np.concatenate(builder.old_log_probs))[targets],
        segments=torch.from_numpy(np.concatenate(builder.segments))[targets],
        sample_of=sample_of[targets],
        within=torch.from_numpy(np.concatenate(builder.within))[targets],
        num_real_tokens=num_real,
    )


class _RowBuilder:
    """Segments of a row in order; every list of arrays concatenates to the row."""

    def __init__(self) -> None:
        self.tokens: list[NDArray[np.int32]] = []
        self.loss_mask: list[NDArray[np.bool_]] = []
        self.advantages: list[NDArray[np.float32]] = []
        self.old_log_probs: list[NDArray[np.float32]] = []
        self.segments: list[NDArray[np.int8]] = []
        self.sample_of: list[NDArray[np.int64]] = []
        self.within: list[NDArray[np.int64]] = []
        self.lengths: list[int] = []
        self.prompt_lengths: list[int] = []
        self.parents: list[int] = []

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def add_group(self, samples: Sequence[TrainSample], group: tuple[int, ...]) -> None:
        prompt_ids = samples[group[0]].prompt_ids
        if len(group) == 1:
            self._segment(prompt_length=len(prompt_ids), parent=-1)
            self._untrained(prompt_ids)
            self._response(samples[group[0]], group[0])
            return
        parent = len(self.lengths)
        self._segment(prompt_length=len(prompt_ids), parent=-1)
        self._untrained(prompt_ids)
        for index in group:
            self._segment(prompt_length=0, parent=parent)
            self._response(samples[index], index)

    def add_padding(self, count: int, pad_id: int) -> None:
        if count:
            self.lengths += [1] * count
            self.prompt_lengths += [1] * count
            self.parents += [-1] * count
            self._columns(np.full(count, pad_id, np.int32), np.zeros(count, np.bool_), -1)

    def _segment(self, *, prompt_length: int, parent: int) -> None:
        self.lengths.append(0)
        self.prompt_lengths.append(prompt_length)
        self.parents.append(parent)

    def _untrained(self, token_ids: NDArray[np.int32]) -> None:
        self.lengths[-1] += len(token_ids)
        self._columns(token_ids, np.zeros(len(token_ids), np.bool_), -1)

    def _response(self, sample: TrainSample, index: int) -> None:
        self.lengths[-1] += len(sample.response_ids)
        self._columns(
            sample.response_ids,
            sample.loss_mask,
            index,
            sample.advantage,
            sample.old_log_probs,
            sample.segments,
        )

    def _columns(
        self,
        token_ids: NDArray[np.int32],
        loss_mask: NDArray[np.bool_],
        index: int,
        advantage: float = 0.0,
        old_log_probs: NDArray[np.float32] | None = None,
        segments: NDArray[np.int8] | None = None,
    ) -> None:
        count = len(token_ids)
        self.tokens.append(token_ids.astype(np.int32, copy=False))
        self.loss_mask.append(loss_mask)
        self.advantages.append(np.full(count, advantage, np.float32))
        self.old_log_probs.append(np.zeros(count, np.float32) if old_log_probs is None else old_log_probs)
        self.segments.append(np.full(count, NO_SEGMENT, np.int8) if segments is None else segments)
        self.sample_of.append(np.full(count, index, np.int64))
        self.within.append(np.arange(count, dtype=np.int64))
