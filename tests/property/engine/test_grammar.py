"""The grammar against its own writer, against itself token by token, and against the layout."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_engine.language.grammar import Defect, Response, last_boxed
from npr_engine.testing import EOS, GRAMMAR, PIECES, VOCABULARY, answer, block, encode
from npr_ext import branch_layout
from npr_ext.testing import GAP_TOKEN as GAP
from tests.property.trees import any_response

WORDS = st.text("abcdefgh 0123", min_size=1, max_size=6).filter(str.strip)
BLOCKS = st.lists(
    st.tuples(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), WORDS), min_size=0, max_size=3
)
TAGS = [2, 3, 4, 5, 6, 7, 8, 9]
# Mostly the tags that may come next, so that deep states are reached; sometimes any token.
MOVES = st.lists(
    st.one_of(st.sampled_from(TAGS), st.integers(0, len(PIECES) - 1), st.just(-1)), min_size=0, max_size=60
)
FOLLOWING = {2: 4, 4: 5, 5: 3, 3: 6, 6: 7, 7: 8, 8: 9, 9: 2}


def _tokens(moves: list[int]) -> list[int]:
    """-1 means the tag that canonically follows the last one."""
    ids: list[int] = []
    last = 9
    for move in moves:
        token = FOLLOWING[last] if move == -1 else move
        if token in FOLLOWING:
            last = token
        if token != EOS:
            ids.append(token)
    return ids


@given(BLOCKS, WORDS)
@settings(max_examples=200)
def test_what_is_written_is_read_back(blocks: list[tuple[list[tuple[str, str]], str]], result: str) -> None:
    written = [block(*(f"{plan}|{step}" for plan, step in items), takeaway=end) for items, end in blocks]
    ids = encode("\n\n".join(written) + answer(result))
    response = GRAMMAR.parse(ids)
    assert isinstance(response, Response), response
    read = [
        (
            [(GRAMMAR.text(ids, p), GRAMMAR.text(ids, s)) for p, s in zip(b.plans, b.steps, strict=True)],
            GRAMMAR.text(ids, b.takeaway),
        )
        for b in response.blocks
    ]
    assert read == [([(p.strip(), s.strip()) for p, s in items], end.strip()) for items, end in blocks]
    assert last_boxed(GRAMMAR.text(ids, response.conclusion)) == result.strip()


@given(MOVES, st.booleans())
@settings(max_examples=400)
def test_token_by_token_finds_what_a_list_finds(moves: list[int], eos: bool) -> None:
    ids = _tokens(moves) + [EOS] * eos
    parser = GRAMMAR.parser()
    for token in ids:
        parser.feed(token)
    assert parser.finish() == GRAMMAR.read(ids)


# Without EOS, which is text to the layout and ends a response for the grammar.
any_text = st.one_of(
    MOVES.map(_tokens),
    st.lists(st.integers(EOS + 1, len(PIECES) - 1), max_size=60),
    any_response.map(lambda ids: [GAP if token == EOS else token for token in ids]),
)


@given(any_text, st.lists(st.integers(0, len(PIECES) + 3), max_size=4))
@settings(max_examples=2000)
def test_the_tag_structure_is_that_of_the_layout(ids: list[int], prompt: list[int]) -> None:
    layout = branch_layout(
        torch.tensor([*prompt, *ids], dtype=torch.int32), tags=VOCABULARY.tags, prompt_lengths=len(prompt)
    )
    structural = GRAMMAR.read(ids).structural
    found = [(each.violation, each.token_index) for each in layout.violations()]
    expected = [] if structural is None else [(structural.violation, structural.token_index + len(prompt))]
    assert found == expected
    assert layout.status.tolist() == [structural.violation if structural else 0]


@given(st.lists(st.integers(-3, len(PIECES) + 3), max_size=40))
@settings(max_examples=200)
def test_any_integers_give_a_tree_or_a_defect_inside_the_text(ids: list[int]) -> None:
    found = GRAMMAR.parse(ids)
    assert isinstance(found, Response) or (isinstance(found, Defect) and 0 <= found.token_index <= len(ids))
