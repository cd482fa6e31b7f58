"""What token ids mean, for the tokenizers that models come with."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from npr_engine.language.vocabulary import TAG_TEXTS, TokenClass, Vocabulary
from npr_engine.testing import EOS, PIECES, VOCABULARY
from npr_ext import TagIds
from npr_ext.errors import UserError


def byte_level(*special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_byte_level_pieces_are_bytes() -> None:
    tokenizer = byte_level("<eos>", *TAG_TEXTS)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    text = "a\n é€ <step>\n1: x</step>"
    assert vocabulary.text(tokenizer.encode(text)) == text
    assert vocabulary.size == 256 + 9 and vocabulary.eos_id == tokenizer.eos_token_id
    space, euro = tokenizer.encode(" ")[0], tokenizer.encode("€")
    assert vocabulary.classes[space] == TokenClass.SPACE and len(euro) == 3
    assert vocabulary.forced_step(12) == tuple(tokenizer.encode("\n<step>\n12:"))
    assert vocabulary.forced_takeaway == tuple(tokenizer.encode("\n<takeaway>\n"))


def test_missing_tags_are_named() -> None:
    with pytest.raises(UserError, match="</plan> <step>"):
        Vocabulary.from_tokenizer(
            byte_level("<eos>", *(t for t in TAG_TEXTS if t not in ("</plan>", "<step>")))
        )


def test_sentencepiece_pieces_are_text() -> None:
    entries = {"<unk>": 0, "▁a": 1, "b": 2, "<0x0A>": 3, "▁": 4}
    backend = Tokenizer(models.BPE(vocab=entries, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<eos>", *TAG_TEXTS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.text([1, 2, 3]) == " ab\n"
    assert [vocabulary.classes[token] for token in (3, 4)] == [TokenClass.SPACE, TokenClass.SPACE]


def test_ids_beyond_the_tokenizer_are_text() -> None:
    padded = VOCABULARY.padded_classes(len(PIECES) + 5)
    assert padded[-5:].tolist() == [TokenClass.TEXT] * 5 and padded[EOS] == TokenClass.EOS
    with pytest.raises(UserError, match="fewer than the tokenizer"):
        VOCABULARY.padded_classes(5)


def test_tags_and_eos_need_different_ids() -> None:
    with pytest.raises(UserError, match="different token ids"):
        Vocabulary(PIECES, eos_id=2, tags=TagIds(*range(2, 10)))


def test_without_a_tokenizer_the_longest_piece_is_taken_first_however_long_the_text() -> None:
    pieces = ["a", "aba", "b", "eos", *TAG_TEXTS]
    vocabulary = Vocabulary(pieces, eos_id=3, tags=TagIds(*range(4, 12)))
    assert vocabulary.encode_piece("abab" * 100_000) == (1, 2) * 100_000
    with pytest.raises(UserError, match="no piece for 'abc'"):
        vocabulary.encode_piece("abc")
