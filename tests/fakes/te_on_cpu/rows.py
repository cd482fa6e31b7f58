"""Rows of a tensor moved: groups padded to the lengths that FP8 products want, first dimensions swapped."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def fused_multi_row_padding(x: Tensor, out: Tensor, lengths: Sequence[int], padded: Sequence[int]) -> None:
    """Groups of `lengths` rows of x to groups of `padded` rows of `out`, filled up with zeros."""
    out.zero_()
    for source, target in zip(x.split(list(lengths)), out.split(list(padded)), strict=True):
        target[: len(source)] = source


def fused_multi_row_unpadding(x: Tensor, out: Tensor, padded: Sequence[int], lengths: Sequence[int]) -> None:
    """And back."""
    for source, target in zip(x.split(list(padded)), out.split(list(lengths)), strict=True):
        target.copy_(source[: len(target)])


def swap_first_dims(x: Tensor, out: Tensor | None = None) -> Tensor:
    """[a, b, ...] to [b, a, ...]."""
    swapped = x.transpose(0, 1)
    return swapped.contiguous() if out is None else out.copy_(swapped)
