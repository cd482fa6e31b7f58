"""Block lists against the dense mask, tile by tile; attention plans against the mask, pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from npr_ext import BranchLayout, UserError, branch_layout
from npr_ext.testing import TAGS, random_layout
from tests.property.trees import any_response, trees

PLAN_HEADER = 5


def tiles(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
    """The listed tiles, each of them listed once."""
    listed = [
        (row, column)
        for row, count in enumerate(counts[0, 0].tolist())
        for column in indices[0, 0, row, :count].tolist()
    ]
    assert len(set(listed)) == len(listed)
    return set(listed)


def pairs_of_plan(layout: BranchLayout) -> torch.Tensor:
    """bool [queries, T]: the pairs that the attention plan computes, each at most once."""
    plan = layout.plan.tolist()
    tokens, first_query, units, intervals, _ = plan[:PLAN_HEADER]
    first = [plan[PLAN_HEADER + 3 * u + 2] for u in range(units)] + [intervals]
    bounds = plan[PLAN_HEADER + 3 * units :]
    computed = torch.zeros(tokens, tokens, dtype=torch.int32)
    for u in range(units):
        begin, end = plan[PLAN_HEADER + 3 * u : PLAN_HEADER + 3 * u + 2]
        computed[begin:end, begin:end] += torch.ones(end - begin, end - begin, dtype=torch.int32).tril()
        for i in range(first[u], first[u + 1]):
            computed[begin:end, bounds[2 * i] : bounds[2 * i + 1]] += 1
    assert computed.max() <= 1
    return computed[first_query:].bool()


def packed(rows: list[list[int]], num_parts: int) -> BranchLayout:
    """The first row is a prompt that the others share; `num_parts` copies of that group stand in one row."""
    group = [0] + [len(rows) * part for part in range(num_parts)]
    return branch_layout(
        torch.tensor([token for row in rows for token in row] * num_parts, dtype=torch.int64),
        tags=TAGS,
        prompt_lengths=torch.tensor(([len(rows[0])] + [0] * (len(rows) - 1)) * num_parts),
        cu_seqlens=torch.tensor([0] + [len(row) for row in rows] * num_parts).cumsum(0),
        parents=torch.tensor([each for start in group[1:] for each in [-1] + [start] * (len(rows) - 1)]),
    )


token_soup = st.lists(st.integers(0, 12), min_size=1, max_size=40)
any_layout = st.one_of(
    trees()
    .filter(lambda tree: len(tree.ids) > 0)
    .map(lambda tree: branch_layout(torch.tensor(tree.ids), tags=TAGS, prompt_lengths=tree.prompt_length)),
    st.builds(
        packed,
        st.lists(any_response | token_soup, min_size=1, max_size=4).filter(any),
        st.integers(1, 2),
    ),
)


@settings(max_examples=800)
@given(any_layout, st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 64, 128]))
def test_the_block_lists_are_the_dense_mask_tile_by_tile(layout: BranchLayout, block: int) -> None:
    mask = layout.block_mask(block)
    visible = layout.visible()
    num_blocks = -(-layout.num_tokens // block)
    padded = torch.zeros(num_blocks * block, num_blocks * block, dtype=torch.bool)
    padded[: layout.num_tokens, : layout.num_tokens] = visible
    per_tile = padded.view(num_blocks, block, num_blocks, block).sum((1, 3))
    partial = {tuple(tile) for tile in torch.nonzero((per_tile > 0) & (per_tile < block * block)).tolist()}
    full = {tuple(tile) for tile in torch.nonzero(per_tile == block * block).tolist()}
    assert tiles(mask.kv_num_blocks, mask.kv_indices) == partial
    assert tiles(mask.full_kv_num_blocks, mask.full_kv_indices) == full
    assert tiles(mask.q_num_blocks, mask.q_indices) == {(k, q) for q, k in partial}
    assert tiles(mask.full_q_num_blocks, mask.full_q_indices) == {(k, q) for q, k in full}


@settings(max_examples=300)
@given(any_layout)
def test_the_attention_plan_computes_every_visible_pair_once(layout: BranchLayout) -> None:
    assert torch.equal(pairs_of_plan(layout), layout.visible())


def test_the_mask_function_of_the_block_mask_is_the_layout() -> None:
    layout = random_layout(0, 500, 2, 3, 0.6).layout()
    ours = layout.block_mask(64)
    theirs = create_block_mask(ours.mask_mod, None, None, 500, 500, device="cpu", BLOCK_SIZE=64)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    q, k = torch.arange(500)[:, None], torch.arange(500)[None]
    assert torch.equal(ours.mask_mod(torch.tensor(0), torch.tensor(0), q, k), layout.visible())


def test_a_plan_is_small() -> None:
    layout = random_layout(0, 8192, 3, 5, 0.85).layout()
    assert layout.plan.numel() < 200


def test_a_random_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="too few"):
        random_layout(0, 50)
