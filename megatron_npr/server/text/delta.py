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
class TextDelta:
    """A piece of a reply: consecutive text of branch `branch` (0: trunk), all of it forced or none.

    `tokens` are those whose text begins in it; a token's text may go on in the next delta.
    """

    branch: int
    forced: bool
    text: str
    tokens: tuple[Token, ...] = ()

    def split(self, length: int) -> tuple[TextDelta, TextDelta]:
        """The first `length` characters, which keep the tokens, and the rest."""
        return (
            TextDelta(self.branch, self.forced, self.text[:length], self.tokens),
            TextDelta(self.branch, self.forced, self.text[length:]),
        )


def joined(deltas: Iterable[TextDelta]) -> list[TextDelta]:
    """Neighbours of one branch and kind joined: the text in as few deltas as possible, none of them empty."""
    filled = (delta for delta in deltas if delta.text or delta.tokens)
    return [
        _whole(list(group)) for _, group in groupby(filled, key=lambda delta: (delta.branch, delta.forced))
    ]


def _whole(parts: list[TextDelta]) -> TextDelta:
    tokens = tuple(token for part in parts for token in part.tokens)
    return TextDelta(parts[0].branch, parts[0].forced, "".join(part.text for part in parts), tokens)
