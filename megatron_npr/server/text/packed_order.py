"""Branches decode side by side; a reader of plain text wants one after the other."""

from __future__ import annotations

from npr_engine.scheduler.streaming import TokenEvent


class PackedOrder:
    """Passes the first open branch on at once and holds its younger siblings back until it has closed."""

    def __init__(self, step_end: int) -> None:
        self._step_end = step_end
        self._current = 1
        self._closed: set[int] = set()
        self._held: dict[int, list[TokenEvent]] = {}

    def push(self, event: TokenEvent) -> list[TokenEvent]:
        """What may be read now, in packed order."""
        if event.branch_id == 0:
            return [*self.rest(), event]
        self._held.setdefault(event.branch_id, []).append(event)
        if int(event.token_ids[-1]) == self._step_end:
            self._closed.add(event.branch_id)
        ready = self._held.pop(self._current, [])
        while self._current in self._closed:
            self._current += 1
            ready += self._held.pop(self._current, [])
        return ready

    def rest(self) -> list[TokenEvent]:
        """What is held back still: the block has ended."""
        rest = [event for branch in sorted(self._held) for event in self._held[branch]]
        self._held.clear()
        self._closed.clear()
        self._current = 1
        return rest
