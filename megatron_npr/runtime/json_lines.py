"""Files of one JSON value a line. A line ends with a newline byte and nothing else: U+2028, U+2029 and U+0085 are characters of
strings, a byte order mark before the first line is none of its text.

bytes ──► lines ──► UTF-8 ──► JSON ──► (place, value); a place is what an error names
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npr_ext.errors import UserError

NO_TEXT_FILES = {
    b"\x1f\x8b": ("compressed (gzip)", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", "unpack it with unzstd"),
    b"\xfd7zXZ\0": ("compressed (xz)", "unpack it with unxz"),
    b"BZh": ("compressed (bzip2)", "unpack it with bunzip2"),
    b"PK\3\4": ("a zip archive", "unpack it"),
    b"PAR1": (
        "a Parquet file",
        "write it as JSON lines (pandas: DataFrame.to_json(lines=True, orient='records'))",
    ),
}
"""First bytes -> what a file is that people download data in, and how it becomes one that can be read."""


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, value) of every line; UserError names the place that is not UTF-8, not JSON or empty."""
    content = file_bytes(path)
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{place}: empty line: remove it")
        yield place, json_value(line, path, number)


def whole_lines(path: Path) -> list[Any]:
    """The values of a file that this program extends line by line; a last line that a crash has cut off is left out."""
    content = file_bytes(path)
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    return [json_value(line, path, number) for number, line in enumerate(lines, start=1)]


def json_value(text: bytes, path: Path, line: int = 1) -> Any:
    """What JSON text says that begins in `line` of a file; UserError, with the line that is wrong, where it is none."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        # Nested thousands of times, a number of thousands of digits.
        raise UserError(f"{path}:{line}: JSON that cannot be read: {error}") from None


def file_bytes(path: Path) -> bytes:
    """The content without a byte order mark; UserError where there is none to read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    for start, (what, remedy) in NO_TEXT_FILES.items():
        if content.startswith(start):
            raise UserError(f"{path} is {what}, not text: {remedy}")
    return content.removeprefix(codecs.BOM_UTF8)
