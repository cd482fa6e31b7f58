"""Named tensors in flat buckets of bytes: the format "flattened_bucket" of SGLang's update_weights_from_tensor.

    (name, tensor)* ──► flat_buckets ──► FlatBucket: uint8 [bytes], and where each tensor lies in it ──► a message each

The reader slices a tensor's bytes out of the bucket and views them as its type, which has to begin at a multiple of its
element size. So every tensor begins at a multiple of `ALIGNMENT`, whatever stands before it: bytes follow from the places
alone, gaps are nobody's. Source: sglang/srt/weight_sync/tensor_bucket.py of SGLang 0.5.20 (its own writer leaves no gaps, and
its reader then fails on mixed types).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
BUCKET_BYTES = 512 << 20


@dataclass(frozen=True)
class FlatTensor:
    """A tensor's place: bytes [begin, end) of its bucket."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    begin: int
    end: int


@dataclass(frozen=True)
class FlatBucket:
    """Bytes of several tensors, uint8 [bytes]."""

    flat: Tensor
    tensors: tuple[FlatTensor, ...]


def flat_buckets(
    named: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[FlatBucket]:
    """Buckets of at most `bucket_bytes`, tensors in their order, a larger one alone; made one at a time, so no more than a
    bucket and the tensors in it is held. All tensors lie on one device, and the buckets there."""
    waiting: list[tuple[FlatTensor, Tensor]] = []
    end = 0
    for name, tensor in named:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        if waiting and begin + tensor.nbytes > bucket_bytes:
            yield _bucket(waiting)
            waiting, begin = [], 0
        end = begin + tensor.nbytes
        waiting.append((FlatTensor(name, tensor.shape, tensor.dtype, begin, end), tensor))
    if waiting:
        yield _bucket(waiting)


def _bucket(waiting: list[tuple[FlatTensor, Tensor]]) -> FlatBucket:
    """A buffer of its own: its reader may still hold the one before."""
    device = waiting[0][1].device
    flat = torch.empty(waiting[-1][0].end, dtype=torch.uint8, device=device)
    for place, tensor in waiting:
        assert tensor.device == device, f"{place.name} lies on {tensor.device}, its bucket on {device}"
        flat[place.begin : place.end].copy_(tensor.detach().reshape(-1).view(torch.uint8))
    return FlatBucket(flat, tuple(place for place, _ in waiting))
