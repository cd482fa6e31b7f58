"""The one definition of the language: what a well-formed parallel response is, token by token.

    token ids ──► Parser (tags: a state machine; texts: checked when they close) ──► Reading
                                                                     │
                                          Grammar.parse ─────────────┴──► Response | Defect

Two levels. Tag structure is npr_ext's layout machine, code by code (a fuzz test holds them together): the
first violation ends the parse. On top of it the strict level collects every defect of the texts: preamble,
numbering, emptiness, text in gaps, the boxed answer, EOS.
"""

from __future__ import annotations

from npr_engine.language.boxed import last_boxed
from npr_engine.language.parser import NUMBER, Parser, State
from npr_engine.language.token_ids import TokenIds
from npr_engine.language.tree import Block, Defect, Reading, Response, Span
from npr_engine.language.vocabulary import Vocabulary

__all__ = ["Block", "Defect", "Grammar", "Parser", "Reading", "Response", "Span", "State", "last_boxed"]


class Grammar:
    """Parses responses (prompt excluded) of one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def parser(self) -> Parser:
        """An incremental parser at the start of a response."""
        return Parser(self.vocabulary)

    def read(self, response_ids: TokenIds, *, require_block: bool = False) -> Reading:
        """Everything that a parse finds: the tree so far, the structural violation, all defects of the texts."""
        parser = Parser(self.vocabulary)
        parser.extend(response_ids)
        return parser.finish(require_block=require_block)

    def parse(self, response_ids: TokenIds, *, require_block: bool = False) -> Response | Defect:
        """The tree of a strictly valid response, or ONE defect: that of the tag structure, else the first one found.

        Without `require_block` a response without any block (a sequential answer) is valid too.
        """
        reading = self.read(response_ids, require_block=require_block)
        return reading.defect or reading.response

    def text(self, response_ids: TokenIds, span: Span) -> str:
        """The text of a span, stripped, without the `N:` of a plan or step."""
        text = self.vocabulary.text([int(token) for token in response_ids[span.start : span.end]])
        match = NUMBER.match(text) if span.number else None
        return text[match.end() if match else 0 :].strip()
