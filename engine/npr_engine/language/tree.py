"""What a parse yields: the tree of a response as token spans, or what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from npr_ext.layout.violations import Violation


@dataclass(frozen=True)
class Span:
    """Tokens start..end-1 of a response: the text between two tags. `number` is N of a plan or step, else
    0."""

    start: int
    end: int
    number: int = 0

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Block:
    """One fork and join. All spans lie between their tags, tags excluded."""

    guideline: Span
    plans: tuple[Span, ...]
    steps: tuple[Span, ...]
    takeaway: Span


@dataclass(frozen=True)
class Response:
    """A parsed response. Without any block all of its text is the conclusion."""

    preamble: Span
    blocks: tuple[Block, ...]
    conclusion: Span
    eos: bool


@dataclass(frozen=True)
class Defect:
    """What is wrong, at which token of the response, and how many complete blocks came before it."""

    violation: Violation
    token_index: int
    message: str
    complete_blocks: int


@dataclass(frozen=True)
class Reading:
    """All that a parse found. `structural` is the violation of the tag structure (at most one: it ends the parse,
    and `response` holds the blocks before it); `defects` are those of the texts, in the order they were found."""

    response: Response
    structural: Defect | None
    defects: tuple[Defect, ...]

    @property
    def defect(self) -> Defect | None:
        """The structural violation, else the first defect of a text, else None: strictly valid."""
        return self.structural or next(iter(self.defects), None)
