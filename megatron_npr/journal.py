"""Work that is done piece by piece, a JSON line each, so that an interrupted command finds again what it had finished.

Journal.append(entry) ──► a whole line, on the disk ──► read_entries at the next start; a line cut off by a crash does not count
"""

import json
import os
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """The entries of one file; `is_writer` is true in one process."""

    def __init__(self, path: Path, *, is_writer: bool, continued: bool) -> None:
        """Take up the entries that are there, or begin an empty file."""
        self._path, self._is_writer = path, is_writer
        self.entries = read_entries(path) if continued else []
        if is_writer:
            whole = _whole(path) if continued else b""
            with path.open("r+b" if path.exists() else "wb") as file:
                file.truncate(len(whole))

    def append(self, entry: Entry) -> None:
        """Add an entry; it is on the disk when this returns."""
        self.entries.append(entry)
        if self._is_writer:
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file, [] where there is none."""
    return [json.loads(line) for line in _whole(path).splitlines()]


def num_entries(path: Path) -> int:
    """How many entries a file has."""
    return _whole(path).count(b"\n")


def _whole(path: Path) -> bytes:
    """The bytes up to the last line that is complete."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]
