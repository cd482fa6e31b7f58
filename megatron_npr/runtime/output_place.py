"""Whether a command can write where it was told to: asked before it begins its work, and found behind an error in its midst."""

import errno
import os
from pathlib import Path

from npr_ext.errors import UserError

REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""A disk that is full, whose quota is used up, that takes nothing any more (Linux mounts a failing one so)."""


def check_folder(folder: Path) -> None:
    """UserError where the folder is neither there nor can be made: before the model is loaded, not after the first step."""
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"cannot write to {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        raise UserError(
            f"cannot write to {folder}: {'read-only file system' if read_only else 'no permission'} in {place}"
        )


def check_file(path: Path, begins: str, kind: str) -> None:
    """UserError where the file's folder cannot be made, or something of another kind stands there, which would be replaced.

    Args:
        path: the file to write.
        begins: how every file of this kind begins.
        kind: for the message: "a trace".
    """
    if path.is_dir():
        raise UserError(f"cannot write to {path}: it is a folder: name a file")
    check_folder(path.parent)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(begins)) not in (b"", begins.encode()):
                raise UserError(
                    f"{path} holds something else than {kind}: it is not replaced; give another --out"
                )


def refused_write(error: BaseException) -> OSError | None:
    """What the disk said, where that is what an exception is, comes from, or carries of other ranks (torch's
    CheckpointException in `failures`); None where it is of another kind."""
    seen: set[int] = set()
    left = [error]
    while left:
        error = left.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in REFUSED:
            return error
        of_ranks = getattr(error, "failures", None) or {}
        left += [failure for failure, _ in of_ranks.values()] if isinstance(of_ranks, dict) else []
        left += [cause for cause in (error.__cause__, error.__context__) if cause is not None]
    return None
