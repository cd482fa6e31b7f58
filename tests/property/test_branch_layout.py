"""The layout operator against the brute-force definition, on well-formed, malformed and meaningless input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_ext import Violation, branch_layout
from npr_ext.layout.branch_layout import BranchLayout
from npr_ext.layout.reference import reference_places, reference_visible
from npr_ext.testing import TAGS
from tests.property.trees import Tree, any_response, prompts, trees


def assert_equals_definition(
    layout: BranchLayout, prompt: list[int], response: list[int], branching: bool
) -> None:
    places, violation, index = reference_places(prompt + response, TAGS, len(prompt), branching=branching)
    assert layout.position_ids.tolist() == [place.position for place in places]
    assert layout.predecessor.tolist() == [place.predecessor for place in places]
    assert layout.branch_ids.tolist() == [place.branch for place in places]
    assert torch.equal(layout.visible(), reference_visible(places))
    assert layout.status.tolist() == [violation]
    assert [(each.violation, each.token_index) for each in layout.violations()] == [(violation, index)] * (
        violation > 0
    )


@settings(max_examples=2000)
@given(trees())
def test_a_well_formed_response_with_gaps_is_laid_out_as_its_tree_says(tree: Tree) -> None:
    layout = branch_layout(
        torch.tensor(tree.ids, dtype=torch.int32), tags=TAGS, prompt_lengths=tree.prompt_length
    )
    assert layout.violations() == ()
    assert torch.equal(layout.visible(), tree.may_attend())
    assert layout.branch_ids.tolist() == tree.branches
    assert layout.position_ids.tolist() == tree.positions()
    assert layout.predecessor.tolist() == tree.predecessors()


@settings(max_examples=1000)
@given(prompts, any_response, st.booleans())
def test_cut_or_malformed_text_is_laid_out_by_the_definition(
    prompt: list[int], response: list[int], branching: bool
) -> None:
    ids = torch.tensor(prompt + response, dtype=torch.int64)
    layout = branch_layout(ids, tags=TAGS, prompt_lengths=len(prompt), branching=branching)
    assert_equals_definition(layout, prompt, response, branching)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(prompts, st.lists(any_response, min_size=1, max_size=3)), min_size=1, max_size=3),
    st.integers(0, 3),
)
def test_a_shared_prompt_gives_every_response_its_unshared_layout(
    groups: list[tuple[list[int], list[list[int]]]], num_pads: int
) -> None:
    ids: list[int] = []
    bounds, prompt_lengths, parents = [0], [], []

    def add(tokens: list[int], prompt_length: int, parent: int) -> None:
        ids.extend(tokens)
        bounds.append(len(ids))
        prompt_lengths.append(prompt_length)
        parents.append(parent)

    for prompt, answers in groups:
        root = len(parents)
        add(prompt, len(prompt), -1)
        for answer in answers:
            add(answer, 0, root)
    for _ in range(num_pads):
        add([0], 0, -1)
    layout = branch_layout(
        torch.tensor(ids, dtype=torch.int64),
        tags=TAGS,
        prompt_lengths=torch.tensor(prompt_lengths),
        cu_seqlens=torch.tensor(bounds),
        parents=torch.tensor(parents),
    )
    visible = layout.visible()
    expected_visible = torch.zeros_like(visible)
    segment = 0
    for prompt, answers in groups:
        prompt_slice = slice(bounds[segment], bounds[segment + 1])
        for answer in answers:
            segment += 1
            rows = torch.tensor(
                [*range(prompt_slice.start, prompt_slice.stop), *range(bounds[segment], bounds[segment + 1])],
                dtype=torch.int64,
            )
            places, violation, _ = reference_places(prompt + answer, TAGS, len(prompt))
            expected_visible[rows[:, None], rows] |= reference_visible(places)
            assert layout.position_ids[rows].tolist() == [place.position for place in places]
            assert layout.branch_ids[rows].tolist() == [place.branch for place in places]
            unshared = [-1 if place.predecessor < 0 else int(rows[place.predecessor]) for place in places]
            assert layout.predecessor[rows].tolist() == unshared
            assert layout.status[segment] == violation
        segment += 1
    expected_visible[range(len(ids) - num_pads, len(ids)), range(len(ids) - num_pads, len(ids))] = True
    assert torch.equal(visible, expected_visible)
    assert layout.position_ids[len(ids) - num_pads :].tolist() == [0] * num_pads
    assert layout.predecessor[len(ids) - num_pads :].tolist() == [-1] * num_pads


any_int = st.one_of(st.integers(-3, 12), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1))


def integers(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The lowest 32 bits of each where the type has no more."""
    return torch.tensor(values, dtype=torch.int64).to(dtype)


@settings(max_examples=1000)
@given(
    st.lists(any_int, max_size=40),
    st.lists(st.tuples(any_int, any_int, any_int), max_size=5),
    any_int,
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from([torch.int32, torch.int64]), min_size=4, max_size=4),
    st.integers(1, 50),
)
def test_any_integers_give_a_layout_in_bounds_and_a_status(
    ids: list[int],
    segments: list[tuple[int, int, int]],
    first_bound: int,
    has_parents: bool,
    branching: bool,
    dtypes: list[torch.dtype],
    block: int,
) -> None:
    layout = branch_layout(
        integers(ids, dtypes[0]),
        tags=TAGS,
        prompt_lengths=integers([s[1] for s in segments], dtypes[1]),
        cu_seqlens=integers([first_bound, *(s[0] for s in segments)], dtypes[2]),
        parents=integers([s[2] for s in segments], dtypes[3]) if has_parents else None,
        branching=branching,
    )
    tokens = torch.arange(len(ids))
    assert ((layout.sequence_end > tokens) & (layout.sequence_end <= len(ids))).all()
    assert ((layout.predecessor >= -1) & (layout.predecessor < tokens)).all()
    assert ((layout.position_ids >= 0) & (layout.position_ids < len(ids))).all() or not ids
    assert layout.visible().diagonal().all()
    assert all(code in set(Violation) for code in layout.status.tolist())
    assert all(0 <= each.token_index <= len(ids) and each.message for each in layout.violations())
    assert layout.plan.numel() > 0
    assert layout.block_mask(block).kv_num_blocks.sum() <= (-(-len(ids) // block)) ** 2


def rows_of(num_tokens: int) -> st.SearchStrategy[list[int]]:
    """What one array of a layout may hold: ends of the row, or anything."""
    number = st.integers(-1, num_tokens + 1) | st.integers(-(2**31), 2**31 - 1)
    return st.just([num_tokens] * num_tokens) | st.lists(number, min_size=num_tokens, max_size=num_tokens)


@settings(max_examples=500)
@given(st.integers(0, 12).flatmap(lambda n: st.tuples(*[rows_of(n)] * 5)), st.integers(1, 20))
def test_any_integers_in_place_of_a_layout_are_refused_or_are_a_layout(
    rows: tuple[list[int], ...], block: int
) -> None:
    layout = BranchLayout.from_tensor(torch.tensor(rows, dtype=torch.int32))
    _, begins, ends, sequence_ends, _ = rows
    if all(
        key < end <= layout.num_tokens and (begin >= until or key < begin < until <= end)
        for key, (begin, until, end) in enumerate(zip(begins, ends, sequence_ends, strict=True))
    ):
        mask = layout.block_mask(block)
        listed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        assert listed <= (-(-layout.num_tokens // block)) ** 2
        assert layout.plan.numel() > 0
    else:
        with pytest.raises(ValueError, match="no layout"):
            layout.block_mask(block)
        with pytest.raises(ValueError, match="no layout"):
            _ = layout.plan


@settings(max_examples=200)
@given(st.lists(st.integers(0, 12), max_size=40), st.integers(1, 40))
def test_a_layout_tells_nothing_of_later_tokens(ids: list[int], cut: int) -> None:
    whole = branch_layout(torch.tensor(ids, dtype=torch.int64), tags=TAGS, prompt_lengths=0)
    prefix = branch_layout(torch.tensor(ids[:cut], dtype=torch.int64), tags=TAGS, prompt_lengths=0)
    size = prefix.num_tokens
    assert torch.equal(whole.visible()[:size, :size], prefix.visible())
    assert torch.equal(whole.position_ids[:size], prefix.position_ids)
    assert torch.equal(whole.predecessor[:size], prefix.predecessor)


def test_a_segment_that_is_no_prompt_cannot_be_a_parent() -> None:
    layout = branch_layout(
        torch.tensor([20, 21, 22, 23]),
        tags=TAGS,
        prompt_lengths=torch.tensor([1, 0]),
        cu_seqlens=torch.tensor([0, 2, 4]),
        parents=torch.tensor([-1, 0]),
    )
    assert layout.status.tolist() == [Violation.OK, Violation.BAD_PARENT]


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 5], [4, 0]])
def test_bounds_that_do_not_cover_the_row_have_a_status(bounds: list[int]) -> None:
    layout = branch_layout(
        torch.arange(20, 24), tags=TAGS, prompt_lengths=torch.tensor([0]), cu_seqlens=torch.tensor(bounds)
    )
    assert layout.status.tolist() == [Violation.BAD_BOUNDS]
