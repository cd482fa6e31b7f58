"""Context-parallel shards and bucket padding: attention over them is attention over the row."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from npr_ext import BranchLayout, UserError, branch_attention, branch_layout
from npr_ext.layout.branch_layout import bucket_length
from npr_ext.layout.reference import reference_attention
from npr_ext.layout.shard import KEY_MULTIPLE, keys_needed, shard_of
from npr_ext.ops.flex import flex_branch_attention
from npr_ext.testing import TAGS, random_layout

any_row = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=60), min_size=1, max_size=4).map(
    lambda rows: branch_layout(
        torch.tensor([token for row in rows for token in row]),
        tags=TAGS,
        prompt_lengths=torch.tensor([len(rows[0])] + [0] * (len(rows) - 1)),
        cu_seqlens=torch.tensor([0] + [len(row) for row in rows]).cumsum(0),
        parents=torch.tensor([-1] + [0] * (len(rows) - 1)),
    )
)


def heads(tokens: int, count: int, seed: int) -> Tensor:
    """float64 [tokens, count, 16] that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, count, 16, generator=generator, dtype=torch.float64).requires_grad_()


@settings(max_examples=300, deadline=None)
@given(any_row, st.floats(0, 1), st.floats(0, 1))
def test_a_shard_sees_of_the_row_what_its_queries_see(layout: BranchLayout, one: float, other: float) -> None:
    begin, end = sorted((int(one * layout.num_tokens), int(other * layout.num_tokens)))
    shard = shard_of(layout, begin, end)
    visible = layout.visible()[begin:end]
    needed = visible[:, :begin].any(0).nonzero()[:, 0]
    assert torch.equal(shard.fetched, needed)
    assert torch.equal(shard.fetched, keys_needed(layout, begin, end))
    first = shard.layout.first_query
    assert first % KEY_MULTIPLE == 0
    seen = shard.layout.visible()
    assert torch.equal(seen[:, : len(needed)], visible[:, needed])
    assert not seen[:, len(needed) : first].any()
    assert torch.equal(seen[:, first:], visible[:, begin:end])
    assert shard.layout.visible_pairs() == int(visible[:, :end].sum())


@settings(max_examples=100, deadline=None)
@given(any_row, st.integers(0, 10**6), st.integers(1, 4))
def test_attention_in_shards_is_attention_over_the_row(layout: BranchLayout, seed: int, parts: int) -> None:
    tokens = layout.num_tokens
    q, k, v = heads(tokens, 4, seed), heads(tokens, 2, seed + 1), heads(tokens, 2, seed + 2)
    weight = heads(tokens, 4, seed + 3).detach()
    expected = reference_attention(q, k, v, layout.visible(), 0.25)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), weight)
    bounds = [tokens * part // parts for part in range(parts + 1)]
    pieces = []
    for begin, end in pairwise(bounds):
        shard = shard_of(layout, begin, end)
        padding = k.new_zeros(shard.layout.first_query - len(shard.fetched), 2, 16)
        keys = torch.cat([k[shard.fetched], padding, k[begin:end]])
        values = torch.cat([v[shard.fetched], padding, v[begin:end]])
        pieces.append(branch_attention(q[begin:end], keys, values, shard.layout, scale=0.25))
    actual = torch.cat(pieces)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(actual, (q, k, v), weight), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_shard_that_is_no_part_of_the_row_is_refused() -> None:
    with pytest.raises(UserError, match="no part of a row of 200"):
        shard_of(random_layout(0, 200, 1, 3, 0.5).layout(), 100, 201)


@settings(max_examples=40, deadline=None)
@given(st.integers(100, 700), st.integers(0, 99), st.booleans())
def test_flex_attention_over_the_bucket_is_attention_over_the_row(
    tokens: int, seed: int, second_half: bool
) -> None:
    row = random_layout(seed, tokens, 1, 3, 0.5).layout()
    layout = shard_of(row, tokens // 2, tokens).layout if second_half else row
    queries = layout.num_tokens - layout.first_query
    q = heads(queries, 4, seed).detach()
    k, v = (heads(layout.num_tokens, 2, each).detach() for each in (1, 2))
    actual = flex_branch_attention(q, k, v, layout.bucket_mask, 0.25, flex_attention)
    expected = reference_attention(q, k, v, layout.visible(), 0.25)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_flex_attention_reads_the_block_lists() -> None:
    """Its CPU kernel skips the tiles that our lists do not name, as the GPU's does."""
    layout = random_layout(3, 1000, 2, 3, 0.7).layout()
    q, k, v = (heads(1000, count, seed).detach().float() for seed, count in enumerate((4, 2, 2)))
    actual = flex_branch_attention(q, k, v, layout.bucket_mask, 0.25)
    expected = reference_attention(q, k, v, layout.visible(), 0.25)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@given(st.integers(1, 1 << 20))
def test_a_bucket_holds_its_tokens_and_little_more(tokens: int) -> None:
    length = bucket_length(tokens)
    assert tokens <= length <= max(tokens * 5 / 4 + 128, 128)
    assert length % 128 == 0
    assert bucket_length(length) == length


def test_lengths_up_to_a_million_fall_into_few_buckets() -> None:
    assert len({bucket_length(tokens) for tokens in range(1, 1 << 20, 97)}) <= 64
