"""Whether a run may go on with the settings at hand; decided before anything is loaded or written.

configuration + newest manifest ──► KEPT by value, BY_SUM by content (input_sums) ──► None, or ONE line that says what is kept
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_npr.config import Section, toml_value
from megatron_npr.config.resuming import BY_SUM, KEPT
from megatron_npr.run_folder.manifest import candidates, first_whole, read_manifest
from npr_ext.errors import UserError

INPUTS = "inputs"
"""Where a checkpoint's progress keeps `input_sums`."""

WEIGHT_FILES = "*.safetensors"
_ENDS = 1 << 20
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model")


def check_resumable(config: Section, checkpoints: Path) -> None:
    """UserError where the run whose checkpoints lie in this folder keeps what `config` changes."""
    manifest, _ = first_whole(candidates(checkpoints), read_manifest)  # KEPT is the same in all of a run's
    if manifest is None:
        return
    before, now = _flat(manifest.config), settings_of(config)
    run = f"the run in {checkpoints.parent} (step {manifest.step})"
    _check_kept(before, now, run)
    check_inputs(before, now, manifest.progress.get(INPUTS, {}), run)
    total = now.get("train.steps")
    if total is not None and total < manifest.step:
        raise UserError(f"train.steps = {total}: {run} is beyond that; give at least {manifest.step}")


def _check_kept(before: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    for name, reason in KEPT.items():
        if name in before and name in now and before[name] != now[name]:
            old, new = toml_value(before[name]), toml_value(now[name])
            raise UserError(
                f"{name} = {new}: {run} keeps {old}, {reason}; give {old}, or start in another run.dir"
            )


def check_inputs(
    before: Mapping[str, Any], now: Mapping[str, Any], kept: Mapping[str, str], run: str
) -> None:
    """UserError unless the inputs have the sums that were kept. `before`, `now`: settings by dotted key."""
    sums = input_sums(now)
    for name in kept.keys() & sums.keys():
        same_name = now[name] == before.get(name)
        missing = same_name and not Path(now[name] or ".").exists()  # its reader says so, and how to mend it
        if sums[name] != kept[name] and not missing:
            change = "is not what it was" if same_name else f"is not what {toml_value(before.get(name))} was"
            raise UserError(
                f"{name} = {toml_value(now[name])} {change} when {run} began, whose data and order are kept; restore it, or "
                "start in another run.dir"
            )


def input_sums(settings: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 (hexadecimal) of what each input of a run holds, by dotted key; a name that is no file counts as itself."""
    return {name: _sum(value) for name, value in settings.items() if name in BY_SUM}


def _sum(value: str | None) -> str:
    if value is not None and Path(value).is_dir():
        return _folder_sum(Path(value))
    if value is not None and Path(value).is_file():
        with Path(value).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(toml_value(value).encode()).hexdigest()


def _folder_sum(folder: Path) -> str:
    """SHA-256 of a model folder: descriptions whole, weights by name, size and both ends (training changes every tensor)."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in (*_DESCRIPTION, WEIGHT_FILES) for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            whole = not path.match(WEIGHT_FILES) or size <= 2 * _ENDS
            digest.update(file.read() if whole else file.read(_ENDS))
            if not whole:
                file.seek(-_ENDS, 2)
                digest.update(file.read())
    return digest.hexdigest()


def settings_of(config: Section) -> dict[str, Any]:
    """A configuration as plain data, by dotted key."""
    return _flat(json.loads(config.model_dump_json()))


def _flat(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
