"""Flat buckets against SGLang's definition of their reader: slice the bytes, view them as the type, reshape."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_npr.rollout.flat_buckets import ALIGNMENT, flat_buckets
from megatron_npr.rollout.sglang_backend import bucket_message

DTYPES = (torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def named(draw: st.DrawFn) -> list[tuple[str, Tensor]]:
    """Tensors of random bytes, types and shapes (no dimension up to three, empty ones too), some not contiguous."""
    found = []
    for index in range(draw(st.integers(0, 12))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        count = torch.Size(shape).numel() * dtype.itemsize
        flat = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype)
        tensor = flat.reshape(shape)
        found.append(
            (f"weight {index}", tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor)
        )
    return found


def sglang_reads(message: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """reconstruct_tensors of SGLang 0.5.20."""
    return [
        (
            entry.name,
            message["flattened_tensor"][entry.start_idx : entry.end_idx]
            .view(entry.dtype)
            .reshape(entry.shape),
        )
        for entry in message["metadata"]
    ]


@given(named(), st.integers(1, 600))
def test_the_reader_gets_every_tensor_bit_for_bit_in_order(
    tensors: list[tuple[str, Tensor]], size: int
) -> None:
    messages = [
        bucket_message(bucket, SimpleNamespace) for bucket in flat_buckets(tensors, bucket_bytes=size)
    ]
    read = [pair for message in messages for pair in sglang_reads(message)]
    assert [name for name, _ in read] == [name for name, _ in tensors]
    for (name, got), (_, tensor) in zip(read, tensors, strict=True):
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        bytes_of = [each.contiguous().reshape(-1).view(torch.uint8) for each in (got, tensor)]
        assert torch.equal(*bytes_of), name


@given(named(), st.integers(1, 600))
def test_buckets_are_bounded_and_as_few_as_their_order_allows(
    tensors: list[tuple[str, Tensor]], size: int
) -> None:
    buckets = list(flat_buckets(tensors, bucket_bytes=size))
    for bucket in buckets:
        assert bucket.flat.dtype == torch.uint8 and bucket.tensors
        assert len(bucket.flat) <= size or len(bucket.tensors) == 1
        ends = [0, *[place.end for place in bucket.tensors]]
        assert ends[-1] == len(bucket.flat)
        for before, place in zip(ends, bucket.tensors, strict=False):
            assert place.begin % ALIGNMENT == 0 and before <= place.begin < before + ALIGNMENT
    for bucket, following in itertools.pairwise(buckets):
        start = -(-len(bucket.flat) // ALIGNMENT) * ALIGNMENT
        assert start + following.tensors[0].end > size


def test_no_more_than_a_bucket_of_tensors_is_taken_in_advance() -> None:
    taken = []

    def source() -> Any:
        for index in range(10):
            taken.append(index)
            yield f"weight {index}", torch.zeros(16)

    buckets = flat_buckets(source(), bucket_bytes=128)
    next(buckets)
    assert taken == [0, 1, 2]
