"""Token events of one response as text.

TokenEvent ──► PackedOrder ──► bytes of each branch ──► whole characters ──► StopStrings (trunk) ──► TextDelta
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npr.server.text.delta import TextDelta, Token, joined
from megatron_npr.server.text.packed_order import PackedOrder
from megatron_npr.server.text.stop_strings import StopStrings
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.scheduler.streaming import TokenEvent

_DECODER = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Counts:
    """Tokens of a response that was read to its end or to a stop string; `critical_path` of them on the longest path."""

    tokens: int
    forced: int
    critical_path: int


class Transcript:
    """Reads the events of one response.

    Args:
        silent: tokens without text: those that end a response.
        stops: strings that end it in the trunk; they are not part of the text.
        interleave: branches as they decode; else one after the other, so that the text is that of the Rollout.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        silent: frozenset[int] = frozenset(),
        stops: Sequence[str] = (),
        interleave: bool = False,
    ) -> None:
        self._pieces = vocabulary.pieces
        self._silent = silent
        self._order = None if interleave else PackedOrder(vocabulary.tags.step_end)
        self._stops = StopStrings(stops)
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._tokens = self._forced = self._joined = 0
        self._block: dict[int, int] = {}

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it; what comes behind is not its text."""
        return self._stops.hit

    @property
    def counts(self) -> Counts:
        return Counts(self._tokens, self._forced, self._joined + max(self._block.values(), default=0))

    def push(self, event: TokenEvent) -> list[TextDelta]:
        """The text that an event makes certain."""
        ready = [event] if self._order is None else self._order.push(event)
        return joined(delta for event in ready for delta in self._read(event))

    def end(self) -> list[TextDelta]:
        """The text that was held back, when no event follows."""
        rest = [] if self._order is None else self._order.rest()
        last = [delta for event in rest for delta in self._read(event)]
        return joined([*last, *self._flush(sorted(self._decoders)), *self._stops.flush()])

    def _read(self, event: TokenEvent) -> list[TextDelta]:
        branch = event.branch_id
        deltas = self._flush(self._left_behind(branch))
        if branch == 0:
            self._joined += max(self._block.values(), default=0)
            self._block.clear()
        else:
            deltas += self._stops.flush()
        decoder = self._decoders.setdefault(branch, _DECODER("replace"))
        for number, forced, logprob in zip(
            event.token_ids.tolist(), event.forced.tolist(), event.logprobs.tolist()
        ):
            if self.stopped:
                break
            self._count(branch, forced)
            if number in self._silent:
                continue
            token = Token(number, None if math.isnan(logprob) else logprob)
            delta = TextDelta(branch, forced, decoder.decode(self._pieces[number]), (token,))
            deltas += self._stops.push(delta) if branch == 0 else [delta]
        return deltas

    def _left_behind(self, branch: int) -> list[int]:
        """Branches whose text does not go on when one of `branch` arrives."""
        if branch == 0 or self._order is not None:
            return [other for other in sorted(self._decoders) if other != branch]
        return [0] if 0 in self._decoders else []

    def _flush(self, branches: Sequence[int]) -> list[TextDelta]:
        """The ends of texts that were cut inside a character."""
        deltas: list[TextDelta] = []
        for branch in branches:
            delta = TextDelta(branch, False, self._decoders.pop(branch).decode(b"", final=True))
            deltas += self._stops.push(delta) if branch == 0 else [delta]
        return deltas

    def _count(self, branch: int, forced: bool) -> None:
        self._tokens += 1
        self._forced += forced
        if branch == 0:
            self._joined += 1
        else:
            self._block[branch] = self._block.get(branch, 0) + 1
