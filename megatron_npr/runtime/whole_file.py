"""A text file that is there whole or not at all, whatever moment the machine chooses to stop."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `path` in one piece, through to the disk; a file that stands there is replaced at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".writing")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)
