"""What a checkpoint says of itself: step, configuration, versions, and a SHA-256 of every file, checked before use.

files ──► file_sum each ──► Manifest ──► manifest.json (canonical, with its own sum)
manifest.json ──► read_manifest ──► find_damage(files) ──► None, or the first file that is not as written
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_npr import __version__
from megatron_npr.runtime.format_version import CURRENT, FORMAT_VERSION, check_format
from megatron_npr.runtime.latest import latest
from npr_ext.errors import UserError

Read = TypeVar("Read")

MANIFEST = "manifest.json"
_OWN_SUM = "sha256"
_BLOCK = 1 << 22


class DamagedCheckpointError(UserError):
    """A checkpoint that is not as it was written; the message names the file."""


@dataclass(frozen=True)
class FileSum:
    """Length in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record beside the tensors. `model` is the architecture, `config` the run's resolved configuration."""

    step: int
    model: Mapping[str, Any]
    config: Mapping[str, Any]
    progress: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileSum]
    format_version: int = CURRENT["checkpoint"]


def versions() -> dict[str, str]:
    """Versions of this package, of the libraries that write checkpoints, and of Python."""
    libraries = {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")}
    return {"megatron-npr": __version__, **libraries, "python": platform.python_version()}


def file_sum(path: Path) -> FileSum:
    """Read a file once; it is on the disk when this returns."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        os.fsync(file.fileno())
        return FileSum(file.tell(), digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, through to the disk."""
    with (folder / MANIFEST).open("wb") as file:
        file.write(_render(dataclasses.asdict(manifest)))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; DamagedCheckpointError unless it is byte for byte what was written, UserError for one of a
    format that this program does not know."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder.name}: {MANIFEST} is missing") from None
    try:
        content = json.loads(raw)
        content.pop(_OWN_SUM)
        intact = _render(content) == raw
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DamagedCheckpointError(f"{folder.name}: {MANIFEST} is not as it was written")
    check_format("checkpoint", folder, content.setdefault(FORMAT_VERSION, 0))
    files = {name: FileSum(**entry) for name, entry in content.pop("files").items()}
    return Manifest(**content, files=files)


def candidates(folder: Path) -> list[Path]:
    """Complete checkpoints in the order in which to resume: the one that `latest` names, then those before it."""
    paths, named = sorted(complete(folder), reverse=True), latest(folder)
    return paths[paths.index(named) :] if named in paths else paths


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, in no order."""
    return [path for path in folder.glob("step_" + 6 * "[0-9]") if path.is_dir()]


def first_whole(paths: Iterable[Path], read: Callable[[Path], Read]) -> tuple[Read | None, list[str]]:
    """What `read` makes of the first checkpoint that it does not find damaged, or None; what is wrong with those before."""
    damaged: list[str] = []
    for path in paths:
        try:
            return read(path), damaged
        except DamagedCheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def find_damage(folder: Path, manifest: Manifest, names: Sequence[str]) -> str | None:
    """The first of `names` that is not as written, and how; None where all are."""
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes, {expected.size} were written"
        if file_sum(path) != expected:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def _render(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON with its own sum: any other bytes render differently once read."""
    body = json.dumps(content, sort_keys=True, indent=1)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({_OWN_SUM: own, **content}, sort_keys=True, indent=1).encode()
