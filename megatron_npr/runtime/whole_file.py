"""A text file that is there whole or not at all, whatever moment the machine chooses to stop."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A file to write into, which becomes `path` at the end of the block, through to the disk.

    After an error `path` is as it was, and what was written lies beside it as `<name>.writing` until the next try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".writing")
    with written.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Write `path` in one piece; a file that stands there is replaced at the end."""
    with whole_file(path) as file:
        file.write(text)
