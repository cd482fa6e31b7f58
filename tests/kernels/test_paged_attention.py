"""Paged attention against its definition in PyTorch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_ext import paged_attention
from npr_ext.layout.reference import reference_paged_attention
from npr_ext.library import cpu_isas
from npr_ext.testing import using_isa

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def random_job(
    seed: int, runs: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Runs of (tokens, keys of the last one), each a causal chunk on its own block table; slots are shared and shuffled."""
    generator = torch.Generator().manual_seed(seed)
    width = max((length for _, length in runs), default=1)
    num_slots = width + 7
    tables = torch.stack([torch.randperm(num_slots, generator=generator)[:width] for _ in runs]).int()
    rows = torch.tensor(
        [row for row, (tokens, _) in enumerate(runs) for _ in range(tokens)], dtype=torch.int32
    )
    lengths = torch.tensor(
        [max(0, length - tokens + 1 + i) for tokens, length in runs for i in range(tokens)], dtype=torch.int32
    )

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = randn(len(rows), heads, dim) * 2
    return q, randn(num_slots, kv_heads, dim), randn(num_slots, kv_heads, dim), tables, rows, lengths


@settings(max_examples=120)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (4, 2), (9, 3), (4, 1), (8, 1)]),
    st.sampled_from([8, 20, 32, 33, 64, 80, 128]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(cpu_isas()),
)
def test_every_token_attends_to_exactly_its_slots(
    seed: int,
    runs: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    isa: str,
) -> None:
    q, k, v, tables, rows, lengths = random_job(seed, runs, *heads, dim, dtype)
    with using_isa(isa):
        actual = paged_attention(q, k, v, tables, rows, lengths)
    seen = lengths > 0
    expected = reference_paged_attention(
        q[seen].double(), k.double(), v.double(), tables, rows[seen], lengths[seen], 1 / math.sqrt(dim)
    )
    assert actual.dtype == dtype
    assert (actual[seen].double() - expected).abs().max() <= TOLERANCE[dtype] * 4
    assert (actual[~seen] == 0).all()


def test_huge_scores_do_not_overflow() -> None:
    q, k, v, tables, rows, lengths = random_job(0, [(1, 200), (30, 200)], 4, 2, 32, torch.float32)
    actual = paged_attention(q * 1e3, k, v, tables, rows, lengths)
    expected = reference_paged_attention(q * 1e3, k, v, tables, rows, lengths, 32**-0.5)
    assert torch.allclose(actual, expected, atol=1e-3)


def test_a_token_decodes_the_same_alone_and_in_any_batch() -> None:
    q, k, v, tables, rows, lengths = random_job(1, [(1, 100), (1, 50), (1, 250)], 4, 2, 32, torch.float32)
    together = paged_attention(q, k, v, tables, rows, lengths)
    for t in range(3):
        alone = paged_attention(q[t : t + 1], k, v, tables, rows[t : t + 1], lengths[t : t + 1])
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize(
    "what, value, told",
    [
        ("block_tables", 10**6, "row 0 of block_tables names slot 1000000 of a cache of"),
        ("block_tables", -1, "row 0 of block_tables names slot -1 of a cache of"),
        ("row_of_token", 5, r"row_of_token\[0\] is 5, but block_tables has 1 rows"),
        ("row_of_token", -1, r"row_of_token\[0\] is -1, but block_tables has 1 rows"),
        ("lengths", 999, r"lengths\[0\] is 999, but block_tables has \d+ slots a row"),
    ],
)
def test_an_index_outside_of_its_table_or_cache_is_refused(what: str, value: int, told: str) -> None:
    q, k, v, tables, rows, lengths = random_job(0, [(2, 40)], 4, 2, 32, torch.float32)
    {"block_tables": tables[0], "row_of_token": rows, "lengths": lengths}[what][0] = value
    with pytest.raises(ValueError, match=told):
        paged_attention(q, k, v, tables, rows, lengths)


def test_no_tokens_are_no_work() -> None:
    q, k, v, tables, rows, lengths = random_job(0, [(2, 40)], 4, 2, 32, torch.float32)
    assert paged_attention(q[:0], k, v, tables, rows[:0], lengths[:0]).shape == (0, 4, 32)


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 200), st.integers(0, 150)), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (4, 2), (9, 3), (8, 1)]),
    st.sampled_from([8, 20, 32, 64]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_rows_that_begin_alike_are_read_together_and_stay_exact(
    seed: int, families: list[tuple[int, int, int]], heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    """Families of (branches, shared keys, most own keys): one token of each branch, as in decoding."""
    generator = torch.Generator().manual_seed(seed)
    width = max(shared + own for _, shared, own in families) + 1
    num_slots = 2 * width
    rows = []
    lengths = []
    for branches, shared, own in families:
        front = torch.randperm(num_slots, generator=generator)[:shared]
        for _ in range(branches):
            rows.append(torch.cat((front, torch.randperm(num_slots, generator=generator)))[:width])
            lengths.append(shared + int(torch.randint(0, own + 1, (), generator=generator)))
    tables, row_of_token = torch.stack(rows).int(), torch.arange(len(rows), dtype=torch.int32)
    length = torch.tensor(lengths, dtype=torch.int32)
    q = torch.randn(len(rows), heads[0], dim, generator=generator, dtype=torch.float64).to(dtype) * 2
    k, v = (
        torch.randn(num_slots, heads[1], dim, generator=generator, dtype=torch.float64).to(dtype)
        for _ in "kv"
    )
    actual = paged_attention(q, k, v, tables, row_of_token, length)
    seen = length > 0
    expected = reference_paged_attention(
        q[seen].double(), k.double(), v.double(), tables, row_of_token[seen], length[seen], 1 / math.sqrt(dim)
    )
    assert ((actual[seen].double() - expected).abs() <= TOLERANCE[dtype] * 4).all()
    assert (actual[~seen] == 0).all()
