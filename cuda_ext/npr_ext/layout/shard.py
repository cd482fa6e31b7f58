"""Context parallelism: what one contiguous shard of a row has to know of the others, from the layout alone.

    layout of the row + bounds of the shard ──► keys_needed (which earlier keys its queries see) ──► shard_of
                                                (layout of [fetched keys, padding, own tokens], queries = own tokens)

Every rank holds the whole layout (five integers a token), so all ranks derive the same exchange without talking.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from npr_ext.errors import UserError
from npr_ext.layout.branch_layout import BranchLayout

KEY_MULTIPLE = 128  # fetched keys are padded to whole tiles, so that queries begin at one


@dataclass(frozen=True)
class LayoutShard:
    """Tokens [begin, end) of a row and the earlier keys that they see.

    Attributes:
        fetched: int64 [F], ascending: indices in the row of the earlier keys.
        layout: of first_query (F, padded to whole tiles; 0 without any) + (end - begin) tokens.
    """

    begin: int
    end: int
    fetched: Tensor
    layout: BranchLayout


def keys_needed(layout: BranchLayout, begin: int, end: int) -> Tensor:
    """int64, ascending: the keys before `begin` that some query in [begin, end) sees.

    A key's queries in the shard are [begin, min(end, sequence_end)); it is needed unless they are none or all hidden.
    """
    last = layout.sequence_end[:begin].clamp(max=end)
    hidden = (layout.hidden_from[:begin] <= begin) & (layout.hidden_until[:begin] >= last)
    return torch.nonzero((last > begin) & ~hidden)[:, 0]


def shard_of(layout: BranchLayout, begin: int, end: int) -> LayoutShard:
    """The shard [begin, end) of a row. Positions and predecessors keep the row's numbering."""
    if not 0 <= begin <= end <= layout.num_tokens:
        raise UserError(f"[{begin}, {end}) is no part of a row of {layout.num_tokens} tokens")
    fetched = keys_needed(layout, begin, end)
    first_query = -(-len(fetched) // KEY_MULTIPLE) * KEY_MULTIPLE
    arrays = torch.zeros(5, first_query + end - begin, dtype=torch.int32, device=layout.arrays.device)
    # A padding key is a sequence of its own, seen by no query of the shard.
    arrays[1:4, :first_query] = torch.arange(1, first_query + 1, dtype=torch.int32, device=arrays.device)
    arrays[:, : len(fetched)] = _moved(layout.arrays[:, fetched], begin, end, first_query)
    arrays[:, first_query:] = _moved(layout.arrays[:, begin:end], begin, end, first_query)
    return LayoutShard(begin, end, fetched, BranchLayout(arrays, first_query=first_query))


def _moved(columns: Tensor, begin: int, end: int, first_query: int) -> Tensor:
    """Layout columns whose bounds count queries of the shard; a bound before it becomes its first query."""
    moved = columns.clone()
    moved[1:4] = columns[1:4].clamp(min=begin, max=end) - begin + first_query
    return moved
