"""The rebuilt tokenizer against byte-level BPE written out, transformers' own conversion, and itself backwards."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_npr.hf.gguf.file import GGUFFile
from megatron_npr.hf.gguf.tokenizer import TokenizerData
from megatron_npr.hf.huggingface import load_tokenizer
from npr_engine.language.vocabulary import TAG_TEXTS, Vocabulary, _byte_level_table

TEXTS = [
    "",
    "Hello, world!",
    "  two  spaces   three\t\ttabs\n\n\nnewlines \n x ",
    "12 + 345 = 357, 3.14159, 2^10=1024",
    "a1b22c333 ٣٤ ½ Ⅷ x²",
    "I'll don't we've they'd it's I'm you're",
    "naïve café Straße Ω ≠ 東京 🙂👩‍👩‍👧 \u200b\ufeff",
    "def f(x):\n    return x**2  # 7\r\n",
    "\\boxed{42} $\\frac{1}{2}$ <step <steps> </ plan>",
    "Jan. 2024—“quotes”… ... --- ___",
    "<guideline>\n<plan>1: a</plan>\n</guideline>\n<step>\n1: b\n</step>\n<takeaway>\nc\n</takeaway>",
    "<|im_start|>user\n12<|im_end|><|endoftext|>",
]


@pytest.fixture(scope="session")
def data(smollm2_gguf: Path) -> TokenizerData:
    return GGUFFile(smollm2_gguf).tokenizer


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(smollm2)


class ByTheBook:
    """llama.cpp's rules for `smollm`: special tokens, every \\p{N} alone, GPT-2's words, then merges by rank."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, data: TokenizerData) -> None:
        self.ids = {text: token for token, text in enumerate(data.tokens)}
        self.ids |= data.carriers
        self.ranks = {pair: rank for rank, pair in enumerate(data.merges)}
        replaced = {data.tokens[token] for token in data.carriers.values()}
        special = [text for text, kind in zip(data.tokens, data.kinds, strict=True) if kind == 3]
        self.special = [text for text in special if text not in replaced] + list(data.carriers)
        self.spelling = {byte: char for char, byte in _byte_level_table().items()}

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for part in regex.split("(" + "|".join(map(regex.escape, self.special)) + ")", text):
            if part in self.special:
                found.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in self.WORDS.findall(piece):
                    found += self._merge([self.spelling[byte] for byte in word.encode()])
        return found

    def _merge(self, symbols: list[str]) -> list[int]:
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            place = pairs.index(best)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [self.ids[symbol] for symbol in symbols if symbol in self.ids]


@pytest.fixture(scope="session")
def by_the_book(data: TokenizerData) -> ByTheBook:
    return ByTheBook(data)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizer)


# Bytes that SmolLM2's vocabulary lacks: six control characters, and what begins a character of planes 4 to 11.
UNSPELLED = "\x04\x06\x13\x14\x16\x1d"
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters=UNSPELLED, max_codepoint=0x3FFFF))
LIKELY_TEXT = st.lists(
    st.sampled_from([*TAG_TEXTS, *" \n\t0179", "the", " step", "'s", "é", "Ω", "½", ":", "\r\n", "<", "/"])
).map("".join)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_ids_of_bpe_by_the_book(text: str, tokenizer: Any, by_the_book: ByTheBook) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == by_the_book.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT | LIKELY_TEXT)
def test_any_text_has_the_ids_of_bpe_by_the_book_and_comes_back(
    text: str, tokenizer: Any, by_the_book: ByTheBook, vocabulary: Vocabulary
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == by_the_book.encode(text)
    assert vocabulary.text(ids) == text


def test_digits_stand_alone_in_front_of_spaces_too(tokenizer: Any) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("x  12 ٣"))
    assert pieces == ["x", "ĠĠ", "1", "2", "Ġ", "Ù", "£"]


def test_transformers_own_conversion_agrees_where_no_digit_follows_spaces(
    tokenizer: Any, smollm2_gguf: Path
) -> None:
    """It leaves out the rule of single digits, which the vocabulary half enforces (it merges no digits)."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        if not regex.search(r"\s\p{N}|<\w+>", text):
            assert tokenizer.encode(text) == theirs.encode(text), text


def test_characters_that_the_vocabulary_cannot_spell_are_few_and_known(data: TokenizerData) -> None:
    known = set(data.tokens)
    missing = {byte for char, byte in _byte_level_table().items() if char not in known}
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert missing - never_in_utf8 == {*map(ord, UNSPELLED), 0xF1, 0xF2}


def test_the_pieces_of_a_tag_spell_it(data: TokenizerData) -> None:
    for tag, token in data.carriers.items():
        assert "".join(data.tokens[piece] for piece in data.tag_pieces()[token]) == tag


def test_user_defined_tokens_are_matched_in_text_and_are_not_special(
    new_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    from megatron_npr.hf.convert import convert_gguf
    from tests.unit.hf.conftest import tiny_metadata

    kinds = tiny_metadata()["tokenizer.ggml.token_type"]
    tokens = tiny_metadata()["tokenizer.ggml.tokens"]
    kinds[tokens.index("12")] = 4
    convert_gguf(str(new_gguf({"tokenizer.ggml.token_type": kinds})), tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    ids = tokenizer.encode("3124<step>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["3", "12", "4", "<step>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3124"
