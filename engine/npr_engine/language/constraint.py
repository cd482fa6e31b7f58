"""What may come next, so that a response cannot be malformed: one table over (state, phase) and tokens.

A row stands in a parser State, and in a Phase of the text since its last tag. Both are small numbers that the
scheduler keeps beside the row, so the mask of a batch is one gather from the table. What a tag cannot get
wrong but a text can: a plan's number (the engine writes `N:` itself, as it does in steps), an empty plan,
step or takeaway, text between plans or before a block, a conclusion that ends without its \\boxed{answer}.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from npr_engine.language.parser import State
from npr_engine.language.vocabulary import TokenClass, Vocabulary


class Phase(IntEnum):
    """How far the text since the last tag has come."""

    EMPTY = 0  # whitespace at most
    BEGUN = 1  # text, but what is open may not close yet
    CLOSABLE = 2  # there is what has to be there: a plan, a printable text, a boxed answer


_TEXT_BETWEEN = (TokenClass.TEXT, TokenClass.SPACE)
_CLOSES = {
    State.TRUNK: TokenClass.EOS,
    State.GUIDELINE: TokenClass.GUIDELINE_END,
    State.PLAN: TokenClass.PLAN_END,
    State.STEP: TokenClass.STEP_END,
    State.TAKEAWAY: TokenClass.TAKEAWAY_END,
}
_HOLDS_TEXT = (State.PLAN, State.STEP, State.TAKEAWAY)


def allowed_classes() -> NDArray[np.bool_]:
    """bool [states, phases, classes]: the classes of tokens that continue a strictly valid response. The
    states in which nobody samples (the engine writes what follows) allow nothing."""
    allowed = np.zeros((len(State), len(Phase), len(TokenClass)), np.bool_)
    for state in (State.TRUNK, *_HOLDS_TEXT):
        allowed[state][:, _TEXT_BETWEEN] = True
    allowed[State.TRUNK, Phase.EMPTY, TokenClass.GUIDELINE] = True
    allowed[State.GUIDELINE][:, (TokenClass.SPACE, TokenClass.PLAN)] = True
    for state, tag in _CLOSES.items():
        allowed[state, Phase.CLOSABLE, tag] = True
    return allowed


class Constraint:
    """The table for one vocabulary and a model with `num_token_ids` output rows, made at its first use.

    X    response, constrained or not.
    """

    def __init__(self, vocabulary: Vocabulary, num_token_ids: int) -> None:
        self._vocabulary = vocabulary
        self.classes = vocabulary.padded_classes(num_token_ids)
        self.unused_ids = vocabulary.unused_ids(num_token_ids)

    @cached_property
    def forbidden(self) -> NDArray[np.bool_]:
        """bool [1 + states * phases, token ids]: row 0 forbids nothing, `masks` names the others."""
        by_token = ~allowed_classes().reshape(-1, len(TokenClass))[:, self.classes]
        return np.concatenate((np.zeros_like(by_token[:1]), by_token))

    def masks(self, states: NDArray[np.int8], phases: NDArray[np.int8]) -> NDArray[np.int32]:
        """Rows of `forbidden`, int32 [S]."""
        return 1 + states.astype(np.int32) * len(Phase) + phases

    def following(
        self, states: NDArray[np.int8], phases: NDArray[np.int8], tokens: NDArray[np.int32]
    ) -> NDArray[np.int8]:
        """Phases after tokens that were sampled in `states`, int8 [S]; a \\boxed answer is not looked for."""
        classes = self.classes[tokens]
        begun = np.where((classes == TokenClass.TEXT) & (phases == Phase.EMPTY), Phase.BEGUN, phases)
        filled = self._printable[tokens] & np.isin(states, _HOLDS_TEXT)
        after_tag = np.where(classes == TokenClass.PLAN_END, Phase.CLOSABLE, Phase.EMPTY)
        after_text = np.where(filled, Phase.CLOSABLE, begun)
        return np.where(classes >= TokenClass.EOS, after_tag, after_text).astype(np.int8)

    def may_answer(self, states: NDArray[np.int8], tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """bool [S]: whether the token may have closed (or spoilt) a \\boxed answer in the trunk: only a brace can."""
        return self._braces[tokens] & (states == State.TRUNK)

    @cached_property
    def _printable(self) -> NDArray[np.bool_]:
        """Tokens that make any text non-empty. A part of a character is not one: parts may add up to a space."""
        return self._tokens_with(_is_printable)

    @cached_property
    def _braces(self) -> NDArray[np.bool_]:
        return self._tokens_with(lambda piece: b"}" in piece)

    def _tokens_with(self, quality: Callable[[bytes], bool]) -> NDArray[np.bool_]:
        found = np.zeros(len(self.classes), np.bool_)
        found[: self._vocabulary.size] = [quality(piece) for piece in self._vocabulary.pieces]
        return found & (self.classes == TokenClass.TEXT)


def _is_printable(piece: bytes) -> bool:
    try:
        return bool(piece.decode("utf-8").strip())
    except UnicodeDecodeError:
        return False
