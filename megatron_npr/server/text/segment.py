"""Text of one branch, as it is handed from the tokens to the replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


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
    filled = (segment for segment in segments if segment.text or segment.tokens)
    return [
        _whole(list(group))
        for _, group in groupby(filled, key=lambda segment: (segment.branch, segment.forced))
    ]


def _whole(parts: list[Segment]) -> Segment:
    tokens = tuple(token for part in parts for token in part.tokens)
    return Segment(parts[0].branch, parts[0].forced, "".join(part.text for part in parts), tokens)
