"""Stop strings in text that arrives in pieces: what could be the beginning of one is held back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megatron_npr.server.text.delta import TextDelta


class StopStrings:
    """Finds the stop string that ends first (of several, the longest), wherever the pieces are cut.

    By Knuth, Morris and Pratt: a character costs a few steps, whatever the stop strings and the text are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held: deque[TextDelta] = deque()
        self._length = 0  # of what is held
        self.hit = False

    def push(self, delta: TextDelta) -> list[TextDelta]:
        """What is certain to come before any stop string; after the hit nothing more."""
        if not self._stops:
            return [delta]
        if self.hit:
            return []
        length = self._length
        self._held.append(delta)
        self._length += len(delta.text)
        for end, char in enumerate(delta.text, start=length + 1):
            ended = [
                len(stop) for index, stop in enumerate(self._stops) if self._take(index, char) == len(stop)
            ]
            if ended:
                self.hit = True
                released = self._release(end - max(ended))
                self._held.clear()
                self._length = 0
                return released
        return self._release(self._length - max(self._matched))

    def flush(self) -> list[TextDelta]:
        """What was held back: the text ends here, or does not go on."""
        released = self._release(self._length)
        self._matched = [0] * len(self._stops)
        return released

    def _take(self, index: int, char: str) -> int:
        """How much of a stop string the text with one more character ends with."""
        stop, borders, matched = self._stops[index], self._borders[index], self._matched[index]
        while matched and stop[matched] != char:
            matched = borders[matched - 1]
        self._matched[index] = matched + (stop[matched] == char)
        return self._matched[index]

    def _release(self, length: int) -> list[TextDelta]:
        """Takes `length` characters from what is held."""
        released: list[TextDelta] = []
        self._length -= length
        while self._held and len(self._held[0].text) <= length:
            length -= len(self._held[0].text)
            released.append(self._held.popleft())
        if length:
            first, self._held[0] = self._held[0].split(length)
            released.append(first)
        return released


def _borders(stop: str) -> list[int]:
    """For each beginning of a string the length of its longest shorter beginning that is its end too."""
    borders = [0]
    for char in stop[1:]:
        length = borders[-1]
        while length and stop[length] != char:
            length = borders[length - 1]
        borders.append(length + (stop[length] == char))
    return borders
