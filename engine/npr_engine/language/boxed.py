"""The last \\boxed{...} of a text that may come in pieces. Each character is read once, whatever the text."""

from __future__ import annotations

import io
import re

_OPENING = "\\boxed{"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


class BoxedReader:
    """Takes text piece by piece; `answer` is what the last complete \\boxed{...} so far holds.

    Braces balance, escaped ones do not count. Complete boxes with growing starts do not overlap, so that
    their contents together are no longer than the text.
    """

    def __init__(self) -> None:
        self.answer: str | None = None
        self._text = io.StringIO()
        self._length = 0
        self._rest = ""  # a backslash whose second half is to come
        self._before = ""  # the end of what was read: a piece may end inside of \boxed{
        # A number for each brace that is open: where the content of a \boxed begins, -1 for other braces.
        self._open: list[int] = []
        self._last_start = -1

    def feed(self, piece: str) -> None:
        """Takes the next characters."""
        text = self._rest + piece
        read = 0
        window = self._before + text
        places = []
        for match in _BRACES.finditer(text):
            read = match.end()
            if len(match[0]) == 1:
                boxed = window.endswith(_OPENING, 0, len(self._before) + read)
                places.append((match[0], self._length + read, boxed))
        self._rest = "\\" if text.endswith("\\") and read < len(text) else ""
        text = text[: len(text) - len(self._rest)]
        self._text.seek(0, io.SEEK_END)
        self._text.write(text)
        self._length += len(text)
        self._before = (self._before + text)[1 - len(_OPENING) :]
        for brace, end, boxed in places:
            self._take(brace, end, boxed)

    def _take(self, brace: str, end: int, boxed: bool) -> None:
        """A brace that counts, and where it ends."""
        if brace == "{":
            self._open.append(end if boxed else -1)
            return
        start = self._open.pop() if self._open else -1
        if start > self._last_start:
            self._last_start = start
            self._text.seek(start)
            self.answer = self._text.read(end - 1 - start).strip()


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds, stripped; None without a complete one."""
    reader = BoxedReader()
    reader.feed(text)
    return reader.answer
