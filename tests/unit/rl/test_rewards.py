"""The format reward: each row of the penalty table (megatron_npr/README.md, stage 1)."""

import pytest

from megatron_npr.data.sft_encoding import encode_response
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from megatron_npr.rl.rewards import format_reward
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary

VALID = (
    "<guideline>\n<plan>1: find the width</plan>\n<plan>2: find the height</plan>\n</guideline>\n"
    "<step>\n1: the width is 3\n</step>\n<step>\n2: the height is 4\n</step>\n"
    "<takeaway>\nmultiply them\n</takeaway>\n\\boxed{12}"
)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(Vocabulary.from_tokenizer(demo_tokenizer()))


def edited(*edits: tuple[str, str]) -> str:
    text = VALID
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    "text, reward",
    [
        pytest.param(VALID, 0.0, id="valid"),
        pytest.param(VALID.removesuffix("\\boxed{12}") + "\n" + VALID, 0.0, id="valid with two blocks"),
        pytest.param("The area is \\boxed{12}", -1.5, id="no block at all"),
        pytest.param("", -1.5, id="nothing"),
        pytest.param(edited(("</takeaway>", "")), -1.5, id="block that is not complete"),
        pytest.param(
            edited(("<takeaway>\nmultiply them\n</takeaway>\n", "")), -1.5, id="block without takeaway"
        ),
        pytest.param(edited(("</guideline>\n", "")), -1.5, id="guideline that is not closed"),
        pytest.param("Let me see.\n" + VALID, -1.5, id="text before the block"),
        pytest.param(VALID.removesuffix("\\boxed{12}") + "\nso\n" + VALID, -1.5, id="text between blocks"),
        pytest.param(
            edited(("<plan>1: find the width</plan>\n", ""), ("<plan>2: find the height</plan>\n", "")),
            -1.0,
            id="guideline without plan",
        ),
        pytest.param(
            edited(("<step>\n2: the height is 4\n</step>\n", "")), -1.0, id="fewer steps than plans"
        ),
        pytest.param(edited(("<plan>2: find the height</plan>\n", "")), -1.0, id="more steps than plans"),
        pytest.param(VALID + "<step>", -1.0, id="stray opening tag after the last block"),
        pytest.param(VALID + "</takeaway>", -1.0, id="stray closing tag after the last block"),
        pytest.param(edited(("\\boxed{12}", "twelve")), -1.0, id="no boxed answer"),
        pytest.param(edited(("\\boxed{12}", "\\boxed{ }")), -1.0, id="empty boxed answer"),
        pytest.param(edited(("<plan>2", "then <plan>2")), -0.4, id="text in the guideline"),
        pytest.param(edited(("<step>\n2", "then\n<step>\n2")), -0.2, id="text between the steps"),
        pytest.param(edited(("find the width", "ab")), -0.4, id="plan under 3 characters"),
        pytest.param(
            edited(("find the width", "ab"), ("find the height", "")), -0.8, id="two short plans, one empty"
        ),
        pytest.param(edited(("the width is 3", "w = 3")), -0.4, id="step under 6 characters"),
        pytest.param(edited(("multiply them", "12")), -0.4, id="takeaway under 6 characters"),
        pytest.param(edited(("<plan>2:", "<plan>3:")), -0.4, id="plan with a wrong number"),
        pytest.param(edited(("\n2: the", "\n1: the")), -0.4, id="step with a wrong number"),
        pytest.param(
            edited(("<plan>2", "then <plan>2"), ("<step>\n2", "then\n<step>\n2"), ("multiply them", "12")),
            -1.0,
            id="blemishes add up",
        ),
        pytest.param(
            edited(
                ("find the width", "a"),
                ("find the height", "b"),
                ("the width is 3", "3"),
                ("the height is 4", "4"),
                ("multiply them", "12"),
                ("<plan>2", "then <plan>2"),
            ),
            -2.0,
            id="never below -2",
        ),
    ],
)
def test_each_row_of_the_penalty_table_has_its_reward(grammar: Grammar, text: str, reward: float) -> None:
    assert format_reward(grammar, encode_response(text, grammar.vocabulary)) == pytest.approx(reward)


def test_a_response_that_was_cut_is_broken_however_well_it_began(grammar: Grammar) -> None:
    ids = encode_response(VALID, grammar.vocabulary)
    assert format_reward(grammar, ids[:-1]) == -1.0
    assert all(format_reward(grammar, ids[:length]) < 0 for length in range(len(ids)))
