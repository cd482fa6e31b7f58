"""Rows over data-parallel ranks: every row once, equal counts, and no worse than dealing them out in turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.data.balance import attended_pairs, row_pairs, share_rows
from megatron_npr.data.packing import TrainSample, pack_row, plan_rows, row_length
from npr_ext import BranchLayout
from npr_ext.testing import TAGS
from tests.property.test_packing import sample_lists

costs_of_rows = st.lists(st.integers(0, 10_000), min_size=1, max_size=40)


@given(costs_of_rows, st.integers(1, 9))
def test_every_row_goes_to_one_rank_and_the_busiest_is_no_busier_than_in_turn(
    costs: list[int], num_ranks: int
) -> None:
    shares = share_rows(costs, num_ranks)
    assert sorted(row for rows in shares.rows for row in rows) == list(range(len(costs)))
    assert len(shares.rows) == num_ranks
    assert max(map(len, shares.rows)) == -(-len(costs) // num_ranks), "padding would cost a micro-batch"
    for rows in shares.rows:
        assert [costs[row] for row in rows] == sorted((costs[row] for row in rows), reverse=True)
    busiest = max(sum(costs[row] for row in rows) for rows in shares.rows)
    assert busiest <= max(sum(costs[rank::num_ranks]) for rank in range(num_ranks))
    if sum(costs):
        assert shares.imbalance == busiest * num_ranks / sum(costs)
    assert share_rows(list(costs), num_ranks) == shares


@given(sample_lists(), st.integers(27, 80), st.booleans(), st.booleans())
def test_the_pairs_of_a_row_are_those_of_its_layout(
    samples: list[TrainSample], row_tokens: int, share: bool, branching: bool
) -> None:
    pairs = [attended_pairs(sample, TAGS, branching=branching) for sample in samples]
    plans = plan_rows(samples, row_tokens=row_tokens, share_prompts=share)
    length = row_length(plans)
    for plan in plans:
        row = pack_row(samples, plan, length=length, tags=TAGS, branching=branching, pad_id=0)
        visible = int(BranchLayout.from_tensor(row.layout).visible().sum())
        assert row_pairs(plan, samples, pairs, length=length) == visible


def test_three_long_rows_and_three_short_ones_over_three_ranks_are_paired() -> None:
    shares = share_rows([9, 9, 9, 1, 1, 1], 3)
    assert shares.imbalance == 1.0
    assert share_rows([9, 1, 9, 1], 2).imbalance == 1.0, "in turn one rank would have both long rows: 1.8"


@given(sample_lists(), st.integers(27, 3000))
def test_rows_in_buckets_hold_the_fullest_row_and_stay_within_the_budgets_tiles(
    samples: list[TrainSample], row_tokens: int
) -> None:
    plans = plan_rows(samples, row_tokens=row_tokens, share_prompts=True)
    length = row_length(plans, row_tokens)
    assert length % 128 == 0
    assert max(plan.num_tokens for plan in plans) <= length < row_tokens + 128
