"""Text of one branch, as it is handed from the tokens to the replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token and its log-probability under the policy; None where the engine wrote it."""

    token_id: int
    logprob: float | None


@dataclass(frozen=True)
class Segment:
    """Consecutive text of branch `branch` (0: trunk), all of it forced or none.

    `tokens` are those whose text begins in it; a token's text may go on in the next segment.
    """

    branch: int
    forced: bool
    text: str
    tokens: tuple[Token, ...] = ()

    def split(self, length: int) -> tuple[Segment, Segment]:
        """The first `length` characters, which keep the tokens, and the rest."""
        return (
            Segment(self.branch, self.forced, self.text[:length], self.tokens),
            Segment(self.branch, self.forced, self.text[length:]),
        )


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same text in as few segments as possible, none of them empty."""
    out: list[Segment] = []
    for segment in segments:
        last = out[-1] if out else None
        if last is not None and (last.branch, last.forced) == (segment.branch, segment.forced):
            tokens = last.tokens + segment.tokens
            out[-1] = Segment(last.branch, last.forced, last.text + segment.text, tokens)
        elif segment.text or segment.tokens:
            out.append(segment)
    return out
