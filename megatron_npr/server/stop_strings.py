"""Stop strings in text that arrives in pieces: what could be the beginning of one is held back."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_npr.server.segment import Segment


class StopStrings:
    """Finds the stop string that ends first (of several, the longest), wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held: list[Segment] = []
        self.hit = False

    def push(self, segment: Segment) -> list[Segment]:
        """What is certain to come before any stop string; after the hit nothing more."""
        if not self._stops:
            return [segment]
        self._held.append(segment)
        text = "".join(held.text for held in self._held)
        places = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.hit = True
            released = self._release(min(places)[1])
            self._held.clear()
            return released
        return self._release(len(text) - self._open_length(text))

    def flush(self) -> list[Segment]:
        """What was held back: the text ends here, or does not go on."""
        released, self._held = self._held, []
        return released

    def _open_length(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )

    def _release(self, length: int) -> list[Segment]:
        """Takes `length` characters from what is held."""
        released: list[Segment] = []
        while self._held and len(self._held[0].text) <= length:
            length -= len(self._held[0].text)
            released.append(self._held.pop(0))
        if length:
            first, self._held[0] = self._held[0].split(length)
            released.append(first)
        return released
