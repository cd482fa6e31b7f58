"""Work that is done piece by piece, a JSON line each, so that an interrupted command finds again what it had finished.

append(entry) ──► a whole line, on the disk ──► entries of the next start; a line that a crash has cut off does not count
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_npr.runtime.json_lines import whole_lines
from megatron_npr.runtime.process_world import World, on_first_rank

Entry = dict[str, Any]


class Journal:
    """The entries of one file, the same on every rank; rank 0 writes."""

    def __init__(self, path: Path, world: World, *, continued: bool) -> None:
        """Take up the entries that are there, or begin an empty file; collective."""
        self._path, self._is_writer = path, world.is_main
        self.entries: list[Entry] = on_first_rank(world, lambda: _open(path, continued=continued))

    def append(self, entry: Entry) -> None:
        """Add an entry; it is on the disk when this returns."""
        self.entries.append(entry)
        if self._is_writer:
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def _open(path: Path, *, continued: bool) -> list[Entry]:
    with path.open("ab") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1 if continued else 0)
    return whole_lines(path)
