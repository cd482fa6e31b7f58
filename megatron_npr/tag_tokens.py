"""The eight tags in a tokenizer that does not know them: which ids carry them, and what their embedding rows start from.

spare special ids ──► carriers ──► a tag's row = the mean of the rows of the pieces that spelled it before
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from npr_engine.vocabulary import TAG_TEXTS
from npr_ext.errors import UserError


def assign_carriers(tokens: Sequence[str], spare_ids: Sequence[int]) -> dict[str, int]:
    """The id that each tag missing from `tokens` gets: spare ids in their order; UserError where they run out."""
    known = set(tokens)
    missing = [tag for tag in TAG_TEXTS if tag not in known]
    if len(spare_ids) < len(missing):
        raise UserError(
            f"the tokenizer has {len(spare_ids)} special tokens to spare, {len(missing)} tags need one each"
        )
    return dict(zip(missing, spare_ids))


def with_tag_rows(weight_VD: Tensor, pieces: Mapping[int, Sequence[int]]) -> Tensor:
    """A copy of an embedding or output matrix [V, D] in which row `id` is the mean of the rows `pieces[id]`.

    A tag's own row was never trained; the mean lies where the model's text `<step>` lies, in and out.
    """
    filled = weight_VD.clone()
    for token, parts in pieces.items():
        filled[token] = weight_VD[list(parts)].to(torch.float32).mean(0)
    return filled
