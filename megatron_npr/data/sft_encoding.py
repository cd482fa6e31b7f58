"""Responses as text and as ids, tokenised piece by piece.

    sampled ids ──► grammar tree ──► canonical text ──► ids      (self-distilled samples of stage 2)
    text ───────────────────────────────────────────► ids      (samples from a file)

The pieces are tags, newlines, the `N` and `:` of plans and steps, and the texts between them. The engine
forces its tokens by the same pieces, so forced text has the same ids in training as in decoding.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from npr_engine.language.grammar import Block, Grammar, Response, Span
from npr_engine.language.token_ids import TokenIds
from npr_engine.language.vocabulary import TAG_TEXTS, Vocabulary

_TAGS = "|".join(re.escape(tag) for tag in TAG_TEXTS)
_PIECES = re.compile(rf"{_TAGS}|\n|(?:(?!{_TAGS})[^\n])+")
_NUMBER = re.compile(r"(\d+)(:)(.*)")


def encode_response(text: str, vocabulary: Vocabulary) -> NDArray[np.int32]:
    """Ids int32 [R] of a response's text, EOS appended: the tokenizer's own, where several end a response."""
    tag_ids = dict(zip(TAG_TEXTS, vocabulary.tag_ids, strict=True))
    ids: list[int] = []
    opened = ""
    for piece in _PIECES.findall(text):
        if piece in tag_ids:
            ids.append(tag_ids[piece])
            opened = piece
        elif piece == "\n":
            ids += vocabulary.newline
        else:
            for part in _number_apart(piece) if opened in ("<plan>", "<step>") else (piece,):
                ids += vocabulary.encode_piece(part)
            opened = ""
    return np.asarray((*ids, vocabulary.eos_id), np.int32)


def canonical_ids(response_ids: TokenIds, grammar: Grammar) -> NDArray[np.int32]:
    """A valid response laid out canonically, int32 [R]: what the engine forces is forced here too."""
    tree = grammar.parse(response_ids)
    assert isinstance(tree, Response), tree
    return encode_response(canonical_text(response_ids, tree, grammar), grammar.vocabulary)


def canonical_text(response_ids: TokenIds, tree: Response, grammar: Grammar) -> str:
    """The text of a valid response: newlines between tags, a blank line before a further guideline."""

    def numbered(span: Span) -> str:
        return f"{span.number}: {grammar.text(response_ids, span)}"

    def block(parts: Block) -> str:
        plans = "".join(f"<plan>{numbered(plan)}</plan>\n" for plan in parts.plans)
        steps = "".join(f"<step>\n{numbered(step)}\n</step>\n" for step in parts.steps)
        takeaway = f"<takeaway>\n{grammar.text(response_ids, parts.takeaway)}\n</takeaway>\n"
        return f"<guideline>\n{plans}</guideline>\n{steps}{takeaway}"

    conclusion = grammar.text(response_ids, tree.conclusion)
    return "\n".join(block(parts) for parts in tree.blocks) + conclusion


def _number_apart(piece: str) -> tuple[str, ...]:
    match = _NUMBER.fullmatch(piece)
    return tuple(part for part in match.groups() if part) if match else (piece,)
