"""The eight tags in a tokenizer that does not know them: which ids carry them, and what their embedding rows start from.

spare special ids, or new ones at the end ──► a tag's row = the mean of the rows of the pieces that spelled it before
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npr_engine.language.vocabulary import TAG_TEXTS
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


def append_tags(tokenizer: Any) -> dict[int, tuple[int, ...]]:
    """Add the tags that a transformers tokenizer lacks, as special tokens behind its last id.

    Returns the new ids, and for each the ids that spelled its tag before.
    """
    known = tokenizer.get_vocab()
    missing = [tag for tag in TAG_TEXTS if tag not in known]
    pieces = [tuple(tokenizer.encode(tag, add_special_tokens=False)) for tag in missing]
    tokenizer.add_tokens(missing, special_tokens=True)
    return dict(zip(tokenizer.convert_tokens_to_ids(missing), pieces, strict=True))


def with_tag_rows(weight_VD: Tensor, pieces: Mapping[int, Sequence[int]]) -> Tensor:
    """A copy of an embedding or output matrix [V, D] in which row `id` is the mean of the rows `pieces[id]`.

    It has more rows than before only where an id needs them, and never fewer: models keep spare rows. A tag's own row was
    never trained; the mean lies where the model's text `<step>` lies, in and out.
    """
    filled = weight_VD.new_zeros(rows_with_tags(weight_VD.shape[0], pieces), weight_VD.shape[1])
    filled[: weight_VD.shape[0]] = weight_VD
    for token, parts in pieces.items():
        filled[token] = weight_VD[list(parts)].to(torch.float32).mean(0)
    return filled


def rows_with_tags(rows: int, pieces: Mapping[int, Sequence[int]]) -> int:
    """Rows of a vocabulary matrix that also holds the ids of `pieces`."""
    return max(rows, *(token + 1 for token in pieces)) if pieces else rows
