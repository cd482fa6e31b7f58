"""The file `latest` of a folder: the name of the folder beside it that the last save or run has left."""

from pathlib import Path

from megatron_npr.runtime.whole_file import write_whole

LATEST = "latest"


def point_to(path: Path) -> None:
    """Let `latest` beside `path` name it, at once and through to the disk."""
    write_whole(path.with_name(LATEST), path.name + "\n")


def latest(folder: Path) -> Path | None:
    """What `latest` in `folder` names, there or not; None where there is no such file or nothing in it."""
    pointer = folder / LATEST
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return folder / name if name else None
