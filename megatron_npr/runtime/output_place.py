"""Whether a command can write where it was told to, asked before it begins its work."""

import os
from pathlib import Path

from npr_ext.errors import UserError


def check_folder(folder: Path) -> None:
    """UserError where the folder is neither there nor can be made: before the model is loaded, not after the first step."""
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"cannot write to {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission in {place}")


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
