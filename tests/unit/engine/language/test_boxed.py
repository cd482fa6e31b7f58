"""The last \\boxed of a text: what a plain definition finds, in any pieces, and each character read once."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from npr_engine.language.boxed import BoxedReader, last_boxed
from npr_engine.testing import GRAMMAR, VOCABULARY, block, encode

LENGTH = 1 << 17
HOSTILE = [
    "\\boxed{",
    "\\boxed{}",
    "\\boxed{\\",
    "{",
    "}",
    "\\",
    "\\{",
    "\\boxed",
    "{\\boxed{}",
    "\\boxed{1}{",
    "1 ",
]


def plain(text: str) -> str | None:
    """Every place from the last one, each read up to its own closing brace: quadratic, and plainly the definition."""
    for start in range(len(text), -1, -1):
        if not text.startswith("\\boxed{", start):
            continue
        depth, index = 1, start + len("\\boxed{")
        while index < len(text):
            if text[index] == "\\":
                index += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : index].strip()
            index += 1
    return None


@given(
    st.lists(st.sampled_from(["\\boxed{", "\\", "{", "}", "boxed{", "a", " ", "\u2028"])), st.integers(1, 9)
)
@example(["\\", "\\boxed{", "a", "}"], 1)
@example(["\\boxed{", "\\boxed{", "}", "}", "}"], 2)
def test_the_last_box_is_the_definitions_in_any_pieces(parts: list[str], size: int) -> None:
    text = "".join(parts)
    assert last_boxed(text) == plain(text)
    reader = BoxedReader()
    for start in range(0, len(text), size):
        reader.feed(text[start : start + size])
        assert reader.answer == plain(text[: start + size])


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_is_read_in_time_that_grows_with_its_length(unit: str) -> None:
    """Reading each \\boxed{ to the end, as before, takes minutes for the first of these (6.6 s for 4,000 of them)."""
    text = unit * (LENGTH // len(unit))
    began = time.thread_time()
    last_boxed(text)
    assert time.thread_time() - began < 20


class Counting:
    """A vocabulary that counts the tokens whose text is asked for."""

    def __init__(self) -> None:
        self.num_read = 0

    def text(self, token_ids: Iterable[int]) -> str:
        ids = list(token_ids)
        self.num_read += len(ids)
        return VOCABULARY.text(ids)

    def __getattr__(self, name: str) -> object:
        return getattr(VOCABULARY, name)


@pytest.mark.parametrize("unit", ["}", "\\boxed{", "\\boxed{}", "{}"])
def test_a_parser_that_is_asked_at_every_token_reads_each_once(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser, counting = GRAMMAR.parser(), Counting()
    monkeypatch.setattr(parser, "_vocabulary", counting)
    ids = encode(block("a|b") + unit * 300)
    asked = [parser.has_answer for token in ids if parser.feed(token) is None]
    assert not any(asked)
    assert counting.num_read <= 2 * len(ids)  # once here, once by the checks of the block's texts


def test_a_number_of_thousands_of_digits_is_a_wrong_number() -> None:
    for digits in ("1" * 5000, "0" * 5000 + "1"):
        reading = GRAMMAR.read(encode(block("a|b").replace("1:", f"{digits}:")))
        assert {defect.violation.name for defect in reading.defects} >= {"PLAN_NUMBERING", "STEP_NUMBERING"}
