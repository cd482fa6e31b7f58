"""Files of a model folder as people have them: whole, cut off, damaged, or a pointer that git-lfs left in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npr_ext.errors import UserError

_POINTER = b"version https://git-lfs"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError with one line where there is none."""
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: copy it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def refuse_pointer(path: Path) -> None:
    """UserError where a file is the few lines by which git-lfs stands for it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if start == _POINTER:
        raise UserError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in its folder")


def some(names: list[str], *, shown: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
