"""Branch layouts: who sees whom, at which position, predicted by whom, as O(T) integers.

The definition is cuda_ext/README.md, "Who sees whom"; the arrays are explained in "The layout" there.

token ids + segments ──► branch_layout (C++, one pass) ──► BranchLayout ──► as_tensor [5, T] travels with the batch
                                                                └──► attention plan, block mask (derived on demand)
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from npr_ext import library  # noqa: F401  (registers torch.ops.npr)
from npr_ext.errors import UserError
from npr_ext.layout.tags import TagIds
from npr_ext.layout.violations import MESSAGES, Violation

NUM_ARRAYS = 5
TILE = 128  # queries and keys of a FlexAttention tile
STEPS_AN_OCTAVE = 4


def bucket_length(num_tokens: int) -> int:
    """The least bucket that holds so many tokens: whole tiles, four lengths between powers of two (at most 1/4 more).

    FlexAttention is compiled for a shape; a run then needs few shapes.
    """
    tiles = max(1, -(-num_tokens // TILE))
    step = max(1, (1 << (tiles - 1).bit_length()) // (2 * STEPS_AN_OCTAVE))
    return -(-tiles // step) * step * TILE


@dataclass(frozen=True)
class LayoutViolation:
    """What is wrong with one segment, and where in the row."""

    segment: int
    token_index: int
    violation: Violation

    @property
    def message(self) -> str:
        """The violation in words."""
        return MESSAGES[self.violation]


@dataclass(frozen=True, eq=False)
class BranchLayout:
    """The layout of a row of T packed tokens; tensors are int32 on the device of the tokens.

    A query q sees a key k iff ``k <= q < sequence_end[k] and not hidden_from[k] <= q < hidden_until[k]``.

    Attributes:
        arrays: [5, T]: position ids, hidden from, hidden until, sequence end, predecessor.
        parsed: what only `branch_layout` knows and does not travel: branch ids [T] and verdicts [2, n].
        first_query: all tokens are keys, those from here on are queries; 0 but in a shard (npr_ext.layout.shard).
    """

    arrays: Tensor
    parsed: tuple[Tensor, Tensor] | None = None
    first_query: int = 0

    @classmethod
    def from_tensor(cls, arrays: Tensor) -> "BranchLayout":
        """The layout whose `as_tensor()` is `arrays` (int32 [5, T]); it has no branch ids and no status."""
        if arrays.dim() != 2 or arrays.shape[0] != NUM_ARRAYS or arrays.dtype != torch.int32:
            raise UserError(
                f"a layout tensor is int32 [5, T], not {arrays.dtype} {list(arrays.shape)}: pass BranchLayout.as_tensor()"
            )
        return cls(arrays)

    def as_tensor(self) -> Tensor:
        """int32 [5, T], without a copy: the only form that travels."""
        return self.arrays

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.arrays.shape[1]

    @property
    def position_ids(self) -> Tensor:
        """[T]: siblings start at the same position, a join after the longest of them."""
        return self.arrays[0]

    @property
    def hidden_from(self) -> Tensor:
        """[T], per key: first query that does not see it."""
        return self.arrays[1]

    @property
    def hidden_until(self) -> Tensor:
        """[T], per key: first query that sees it again."""
        return self.arrays[2]

    @property
    def sequence_end(self) -> Tensor:
        """[T], per key: end of the queries that may see it."""
        return self.arrays[3]

    @property
    def predecessor(self) -> Tensor:
        """[T]: index whose hidden state predicts the token; -1 where nothing does (no label, no loss)."""
        return self.arrays[4]

    @property
    def branch_ids(self) -> Tensor:
        """[T]: 0 for trunk, i for branch i of its block."""
        return self._parsed()[0]

    @property
    def status(self) -> Tensor:
        """[n]: `Violation` code of every segment, 0 where it is well-formed."""
        return self._parsed()[1][0]

    def violations(self) -> tuple[LayoutViolation, ...]:
        """The segments that are malformed, in order (copies the status to the host)."""
        codes, indices = self._parsed()[1].tolist()
        return tuple(
            LayoutViolation(segment, index, Violation(code))
            for segment, (code, index) in enumerate(zip(codes, indices, strict=True))
            if code != Violation.OK
        )

    def visible(self) -> Tensor:
        """bool [queries, T]: the dense mask, for tests and small T."""
        k_1T = torch.arange(self.num_tokens, device=self.arrays.device, dtype=torch.int32)[None, :]
        q_Q1 = k_1T.T[self.first_query :]
        hidden = (self.hidden_from <= q_Q1) & (q_Q1 < self.hidden_until)
        return (k_1T <= q_Q1) & (q_Q1 < self.sequence_end) & ~hidden

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that attend."""
        first = torch.arange(self.num_tokens, device=self.arrays.device).clamp(min=self.first_query)
        seen = (self.sequence_end - first).clamp(min=0)
        hidden = (self.hidden_until - torch.maximum(self.hidden_from, first)).clamp(min=0)
        return int((seen - hidden).sum())

    def density(self) -> float:
        """Visible pairs as a share of all queries x T."""
        return self.visible_pairs() / max(1, (self.num_tokens - self.first_query) * self.num_tokens)

    @cached_property
    def plan(self) -> Tensor:
        """int32: what to compute in attention on the CPU, derived once and used by every layer, forward and
        backward."""
        plan: Tensor = torch.ops.npr.attention_plan(self.arrays, self.first_query)
        return plan

    @cached_property
    def bucket_mask(self) -> BlockMask:
        """What to compute in attention on a GPU: the block mask of the bucket that the row is padded to."""
        return self.in_bucket().block_mask(TILE)

    def in_bucket(self) -> "BranchLayout":
        """This layout with lone tokens at its end, up to `bucket_length`; itself where none are missing."""
        num_tokens = self.num_tokens
        missing = bucket_length(num_tokens - self.first_query) + self.first_query - num_tokens
        if missing == 0:
            return self
        arrays = functional.pad(self.arrays, (0, missing))
        ends = torch.arange(num_tokens, num_tokens + missing, device=arrays.device, dtype=torch.int32) + 1
        arrays[1:4, num_tokens:] = ends
        arrays[4, num_tokens:] = -1
        return BranchLayout(arrays, first_query=self.first_query)

    def block_mask(self, block: int = 128) -> BlockMask:
        """FlexAttention's mask over tiles of `block` x `block`, with full and partial lists and their transposes.

        `first_query` must be a multiple of `block`.
        """
        lists = torch.ops.npr.block_lists(self.arrays, block, self.first_query)
        hidden_from, hidden_until, sequence_end = self.hidden_from, self.hidden_until, self.sequence_end
        first_query = self.first_query

        def may_attend(batch: Tensor, head: Tensor, query: Tensor, k: Tensor) -> Tensor:
            q = query + first_query
            hidden = (hidden_from[k] <= q) & (q < hidden_until[k])
            return (k <= q) & (q < sequence_end[k]) & ~hidden

        partial, partial_indices, full, full_indices, q_partial, q_partial_indices, q_full, q_full_indices = (
            each[None, None] for each in lists
        )
        return BlockMask(
            (self.num_tokens - self.first_query, self.num_tokens),
            partial,
            partial_indices,
            full,
            full_indices,
            q_partial,
            q_partial_indices,
            q_full,
            q_full_indices,
            (block, block),
            may_attend,
        )

    def _parsed(self) -> tuple[Tensor, Tensor]:
        if self.parsed is None:
            raise UserError(
                "a layout made by from_tensor carries no branch ids and no status: ask branch_layout's own"
            )
        return self.parsed


def branch_layout(
    token_ids: Tensor,
    *,
    tags: TagIds,
    prompt_lengths: Tensor | int,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    branching: bool = True,
) -> BranchLayout:
    """Lays out a row of packed sequences.

    Args:
        token_ids: int32 or int64 [T].
        tags: ids of the tags; only tokens after the prompt of a segment are read as tags.
        prompt_lengths: [n] tokens of prompt in each segment (an int for one sequence); 0 for a response with a parent.
        cu_seqlens: [n + 1] bounds of the segments, from 0 to T; one sequence without it. A pad token is a segment.
        parents: [n]: -1, or the segment that is the (whole) prompt which this response continues. The responses of
            a prompt follow it directly.
        branching: False lays every sequence out as plain causal text.

    Malformed text never raises: its valid prefix is laid out, the rest is causal trunk, and `status` tells.
    Neither do integers that make no sense as bounds, prompt lengths or parents: they have a status, too.
    """
    device = token_ids.device
    if isinstance(prompt_lengths, int):
        # By a kernel: a copy would make the host wait.
        prompt_lengths = torch.full((1,), prompt_lengths, device=device)
    if cu_seqlens is None:
        if prompt_lengths.numel() != 1:
            raise UserError(
                f"{prompt_lengths.numel()} prompt lengths need cu_seqlens: pass the bounds of the segments"
            )
        cu_seqlens = torch.arange(2, device=device) * token_ids.numel()
    arrays, verdicts = torch.ops.npr.branch_layout(
        token_ids, tags.as_tuple(), prompt_lengths, cu_seqlens, parents, branching
    )
    return BranchLayout(arrays[:NUM_ARRAYS], (arrays[NUM_ARRAYS], verdicts))
