"""What every token id means to the language: its bytes, and its class (text, whitespace, end of sequence, or
a tag); and which of a model's output rows no token has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npr_ext import TagIds
from npr_ext.errors import UserError

TAG_TEXTS = (
    "<guideline>",
    "</guideline>",
    "<plan>",
    "</plan>",
    "<step>",
    "</step>",
    "<takeaway>",
    "</takeaway>",
)


class TokenClass(IntEnum):
    """Classes of tokens; from EOS on they are structural. The tags stand in the order of TagIds."""

    TEXT = 0
    SPACE = 1
    EOS = 2
    GUIDELINE = 3
    GUIDELINE_END = 4
    PLAN = 5
    PLAN_END = 6
    STEP = 7
    STEP_END = 8
    TAKEAWAY = 9
    TAKEAWAY_END = 10


class Vocabulary:
    """Pieces of all token ids: `pieces[i]` is the text (or the raw bytes) that token i stands for.

    Given as None, it is a hole: an id that no token has. Each of `eos_ids` ends a response; `eos_id`, the
    first of them, is the one that is written where a response is laid out anew.
    """

    def __init__(
        self,
        pieces: Sequence[str | bytes | None],
        eos_id: int,
        tags: TagIds,
        *,
        further_eos_ids: Sequence[int] = (),
        encode_piece: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.pieces = tuple(piece.encode() if isinstance(piece, str) else piece or b"" for piece in pieces)
        self._holes = frozenset(token for token, piece in enumerate(pieces) if piece is None)
        self.eos_id = eos_id
        self.eos_ids = tuple(dict.fromkeys((eos_id, *further_eos_ids)))
        self.tags = tags
        self.tag_ids = tags.as_tuple()
        self._structural = (*self.eos_ids, *self.tag_ids)
        if len(set(self._structural)) != len(self._structural):
            raise UserError(f"EOS and the eight tags need different token ids, got {self._structural}")
        unknown = [token for token in self._structural if not self.has(token)]
        if unknown:
            raise UserError(
                f"token ids {unknown} of EOS or tags are none of the vocabulary ({self.size} ids)"
            )
        self.classes: NDArray[np.uint8] = np.zeros(len(self.pieces), np.uint8)
        for token, piece in enumerate(self.pieces):
            if piece.isspace():
                self.classes[token] = TokenClass.SPACE
        self.classes[list(self.eos_ids)] = TokenClass.EOS
        self.classes[list(self.tag_ids)] = range(TokenClass.GUIDELINE, TokenClass.TAKEAWAY_END + 1)
        self._not_text = {int(token): int(self.classes[token]) for token in np.flatnonzero(self.classes)}
        self._encode_piece = encode_piece or self._encode_by_pieces
        self._forced_steps: dict[int, tuple[int, ...]] = {}

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, further_eos_ids: Sequence[int] = ()) -> Vocabulary:
        """Vocabulary of a Hugging Face fast tokenizer; UserError names the tags that are not single tokens of
        it. `further_eos_ids` end a response as its own EOS does, if it has one."""
        known: dict[str, int] = tokenizer.get_vocab()
        missing = [text for text in TAG_TEXTS if text not in known]
        if missing:
            raise UserError(
                f"tags missing from the tokenizer: {' '.join(missing)}; add them as special tokens"
            )
        eos_ids = [token for token in (tokenizer.eos_token_id, *further_eos_ids) if token is not None]
        if not eos_ids:
            raise UserError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        to_bytes = _piece_decoder(tokenizer)
        added = {token: str(entry.content) for token, entry in tokenizer.added_tokens_decoder.items()}
        pieces: list[bytes | None] = [None] * (max(known.values()) + 1)
        for text, token in known.items():
            pieces[token] = added[token].encode() if token in added else to_bytes(text)
        return cls(
            pieces,
            eos_ids[0],
            TagIds(*(known[text] for text in TAG_TEXTS)),
            further_eos_ids=eos_ids[1:],
            encode_piece=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        )

    @property
    def size(self) -> int:
        return len(self.pieces)

    def has(self, token_id: int) -> bool:
        """Whether some token has this id."""
        return 0 <= token_id < self.size and token_id not in self._holes

    def unused_ids(self, num_rows: int) -> NDArray[np.int64]:
        """Output rows of a model with `num_rows` that no token has: the holes, and the padding behind the
        last token."""
        return np.array([*sorted(self._holes), *range(self.size, num_rows)], np.int64)

    def class_bytes(self, token_ids: list[int]) -> bytes:
        """The class of each token; ids outside the vocabulary are text."""
        known = self._not_text
        return bytes([known.get(token, 0) for token in token_ids])

    def padded_classes(self, size: int) -> NDArray[np.uint8]:
        """`classes` for a model with `size` >= self.size output rows; the ids beyond the tokenizer are text."""
        if size < self.size:
            raise UserError(f"the model has {size} token ids, fewer than the tokenizer's {self.size}")
        return np.concatenate((self.classes, np.zeros(size - self.size, np.uint8)))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, tags included; bytes that are not UTF-8 become replacement characters."""
        size = len(self.pieces)
        return b"".join(self.pieces[t] for t in token_ids if 0 <= t < size).decode("utf-8", errors="replace")

    def encode_piece(self, text: str) -> tuple[int, ...]:
        """Token ids of one piece of plain text."""
        return tuple(self._encode_piece(text))

    @cached_property
    def newline(self) -> tuple[int, ...]:
        return self.encode_piece("\n")

    def forced_step(self, number: int) -> tuple[int, ...]:
        """Token ids of `\\n<step>\\nN:`, the opening of branch N that the engine forces and SFT encodes."""
        if number not in self._forced_steps:
            opening = (*self.newline, self.tags.step, *self.newline)
            self._forced_steps[number] = (*opening, *self.forced_plan(number))
        return self._forced_steps[number]

    def forced_plan(self, number: int) -> tuple[int, ...]:
        """Token ids of `N:`, which the engine writes after the `<plan>` of a constrained response."""
        return (*self.encode_piece(str(number)), *self.encode_piece(":"))

    @cached_property
    def forced_takeaway(self) -> tuple[int, ...]:
        """Token ids of `\\n<takeaway>\\n`, forced when the last branch has closed."""
        return (*self.newline, self.tags.takeaway, *self.newline)

    def _encode_by_pieces(self, text: str) -> list[int]:
        """Without a tokenizer: the longest known piece first."""
        ids: list[int] = []
        encoded, start = text.encode(), 0
        known = {p: t for t, p in reversed(list(enumerate(self.pieces))) if p and t not in self._structural}
        longest = max(map(len, known), default=0)
        while start < len(encoded):
            fitting = (encoded[start:end] for end in range(start + longest, start, -1))
            piece = next((piece for piece in fitting if piece in known), None)
            if piece is None:
                raise UserError(f"the vocabulary has no piece for {text!r}, which the engine must write")
            ids.append(known[piece])
            start += len(piece)
        return ids


def _piece_decoder(tokenizer: Any) -> Callable[[str], bytes]:
    """How the vocabulary entries of this tokenizer spell bytes."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
    spelling = json.dumps(decoder)
    if '"ByteLevel"' in spelling:
        table = _byte_level_table()
        return lambda piece: b"".join(
            bytes((table[char],)) if char in table else char.encode() for char in piece
        )
    if '"Metaspace"' in spelling or "▁" in spelling or "\\u2581" in spelling:
        return _sentencepiece_bytes
    return str.encode


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}
