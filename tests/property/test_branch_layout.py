"""The layout operator against the brute-force definition, on well-formed, malformed and meaningless input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_ext import TagIds, Violation, branch_layout
from npr_ext.layout import BranchLayout
from npr_ext.reference import reference_places, reference_visible

TAGS = TagIds(2, 3, 4, 5, 6, 7, 8, 9)
GAP, TEXT, EOS = 10, 11, 1

texts = st.lists(st.sampled_from([TEXT, TEXT + 1, GAP]), max_size=4)
gaps = st.lists(st.just(GAP), max_size=2)


@st.composite
def blocks(draw: st.DrawFn) -> list[int]:
    num_branches = draw(st.integers(1, 4))
    ids = [TAGS.guideline]
    for _ in range(num_branches):
        ids += [*draw(gaps), TAGS.plan, *draw(texts), TAGS.plan_end]
    ids += [*draw(gaps), TAGS.guideline_end]
    for _ in range(num_branches):
        ids += [*draw(gaps), TAGS.step, *draw(texts), TAGS.step_end]
    return [*ids, *draw(gaps), TAGS.takeaway, *draw(texts), TAGS.takeaway_end, *draw(gaps)]


@st.composite
def responses(draw: st.DrawFn) -> list[int]:
    return sum(draw(st.lists(blocks(), max_size=3)), draw(texts)) + draw(texts)


prompts = st.lists(st.integers(0, 14), max_size=5)  # tags in a prompt mean nothing
any_response = st.one_of(
    responses(),
    responses().flatmap(lambda ids: st.integers(0, len(ids)).map(lambda cut: ids[:cut])),
    st.tuples(responses(), st.integers(0, 60), st.integers(0, 12)).map(
        lambda drawn: [drawn[2] if i == drawn[1] else each for i, each in enumerate(drawn[0])]
    ),
    st.lists(st.integers(0, 12), max_size=30),
)


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


@settings(max_examples=2000, deadline=None)
@given(prompts, responses())
def test_a_well_formed_response_with_gaps_is_laid_out_by_the_definition(
    prompt: list[int], response: list[int]
) -> None:
    layout = branch_layout(
        torch.tensor(prompt + response, dtype=torch.int32), tags=TAGS, prompt_lengths=len(prompt)
    )
    assert layout.violations() == ()
    assert_equals_definition(layout, prompt, response, True)


@settings(max_examples=1000, deadline=None)
@given(prompts, any_response, st.booleans())
def test_cut_or_malformed_text_is_laid_out_by_the_definition(
    prompt: list[int], response: list[int], branching: bool
) -> None:
    ids = torch.tensor(prompt + response, dtype=torch.int64)
    layout = branch_layout(ids, tags=TAGS, prompt_lengths=len(prompt), branching=branching)
    assert_equals_definition(layout, prompt, response, branching)


@settings(max_examples=150, deadline=None)
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


any_int = st.one_of(st.integers(-3, 12), st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=500, deadline=None)
@given(st.lists(any_int, max_size=20), st.lists(st.tuples(any_int, any_int, any_int), max_size=5), any_int)
def test_any_integers_give_a_layout_in_bounds_and_a_status(
    ids: list[int], segments: list[tuple[int, int, int]], first_bound: int
) -> None:
    layout = branch_layout(
        torch.tensor(ids, dtype=torch.int64),
        tags=TAGS,
        prompt_lengths=torch.tensor([s[1] for s in segments], dtype=torch.int64),
        cu_seqlens=torch.tensor([first_bound, *(s[0] for s in segments)], dtype=torch.int64),
        parents=torch.tensor([s[2] for s in segments], dtype=torch.int64),
    )
    tokens = torch.arange(len(ids))
    assert ((layout.sequence_end > tokens) & (layout.sequence_end <= len(ids))).all()
    assert ((layout.predecessor >= -1) & (layout.predecessor < tokens)).all()
    assert ((layout.position_ids >= 0) & (layout.position_ids < len(ids))).all() or not ids
    assert layout.visible().diagonal().all()
    assert all(code in set(Violation) for code in layout.status.tolist())
    torch.ops.npr.attention_plan(layout.as_tensor())


@settings(max_examples=200, deadline=None)
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
