"""SFT encoding: pieces, forced openings, the canonical layout of sampled responses."""

import pytest

from megatron_npr.data.sft_encoding import canonical_ids, encode_response
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from npr_engine.language.grammar import Grammar, Response
from npr_engine.language.vocabulary import Vocabulary

BLOCK = (
    "<guideline>\n<plan>1: pen</plan>\n<plan>2: a b</plan>\n</guideline>\n<step>\n1: pen=9\n</step>\n"
    "<step>\n2: 10: ten\n</step>\n<takeaway>\nsorted pen\n</takeaway>\n"
)
CANONICAL = BLOCK + "\n" + BLOCK + "so\n\\boxed{9}"


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(Vocabulary.from_tokenizer(demo_tokenizer()))


def contains(ids: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(ids[start : start + len(part)]) == part for start in range(len(ids)))


def test_the_ids_spell_the_text_and_hold_the_forced_openings(grammar: Grammar) -> None:
    vocabulary = grammar.vocabulary
    ids = encode_response(CANONICAL, vocabulary).tolist()
    assert vocabulary.text(ids[:-1]) == CANONICAL and ids[-1] == vocabulary.eos_id
    assert contains(ids, vocabulary.forced_step(1)) and contains(ids, vocabulary.forced_step(2))
    assert contains(ids, vocabulary.forced_takeaway)


def test_a_canonical_response_stays_as_it_is(grammar: Grammar) -> None:
    ids = encode_response(CANONICAL, grammar.vocabulary)
    assert isinstance(grammar.parse(ids), Response)
    assert canonical_ids(ids, grammar).tolist() == ids.tolist()


def test_a_valid_response_with_odd_gaps_becomes_canonical(grammar: Grammar) -> None:
    odd = (
        CANONICAL.replace("</plan>\n", "</plan> \n\n")
        .replace("<step>\n", "<step>")
        .replace("\n</step>", "  </step>")
    )
    odd = odd.replace("<takeaway>\n", "<takeaway>  ").replace("1:", "1 :")
    ids = encode_response(odd, grammar.vocabulary)
    assert isinstance(grammar.parse(ids), Response)
    assert grammar.vocabulary.text(canonical_ids(ids, grammar)[:-1].tolist()) == CANONICAL
