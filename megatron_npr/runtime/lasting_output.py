"""Standard output and error whose reader may go away: what is written after that is dropped, and the work goes on.

`npr stage3 ... | head`, or a terminal that was closed, ends the reading and not the training. So no other pipe that breaks,
such as a worker's, is ever taken for that one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class LastingOutput:
    """A text stream over a file descriptor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self) -> None:
        """From here on everything goes nowhere, also what the stream still holds."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._stream.flush()


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Both standard streams are such for the length of a with-block, and written out at its end."""
    before = sys.stdout, sys.stderr
    if before[0] is not None:
        sys.stdout = cast(TextIO, LastingOutput(before[0]))
    if before[1] is not None:
        sys.stderr = cast(TextIO, LastingOutput(before[1]))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
