"""Writing a model folder so that it is there whole or not at all.

    whole_folder(target) ──► staging folder ──► write_tensors, tokenizer, config.json ──► renamed to target

What stands at the target is moved aside only when the new folder is complete.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_npr.hf.finite import check_finite
from npr_ext.errors import UserError

SHARD_BYTES = 4 << 30
"""Largest file of weights; also what writing holds in memory at most."""


def check_target(target: Path, *, replace: bool) -> None:
    """UserError where `target` may not be written: it is taken, or what stands there is no model."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file: name a folder that does not exist yet")
    if not any(target.iterdir()):
        return
    if not replace:
        raise UserError(f"{target} exists already: choose another folder, or --force to replace it")
    if not (target / "config.json").is_file():
        raise UserError(f"{target} holds something else than a model (no config.json): it is not replaced")


@contextmanager
def whole_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end of the block; after an error nothing has changed.

    UserError where the target is taken (see `check_target`) or the place cannot be written to.
    """
    target = target.resolve()  # through links: a link to a model stays one
    check_target(target, replace=replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            staging = Path(place) / "new"
            staging.mkdir()
            yield staging
            _exchange(staging, target, Path(place) / "old")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}") from error


def _exchange(new: Path, target: Path, aside: Path) -> None:
    """`new` becomes `target`; what stands there is moved `aside`, and back where that fails half-way."""
    try:
        if target.exists():
            target.rename(aside)
        new.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into files of at most `limit` bytes (a larger tensor gets a file of its own)."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_tensors(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], *, limit: int = SHARD_BYTES
) -> None:
    """Safetensors as transformers names them: one file, or several with an index; a shard is read at a time.

    Args:
        folder: exists.
        sizes: bytes of each tensor, in the order of the files.
        read: gives the tensor of a name, in the type in which it is written.
        limit: bytes of a file.
    """
    shards = plan_shards(sizes, limit)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{several}.safetensors"
        tensors = {name: _writable(name, read(name)) for name in names}
        assert all(tensor.nbytes == sizes[name] for name, tensor in tensors.items())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # it writes for its owner alone
        file_of.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_json(folder / "model.safetensors.index.json", index)


def _writable(name: str, weight: Tensor) -> Tensor:
    """The weight, contiguous; UserError where it is not finite in the type in which it would be written."""
    what = f"{name} in {str(weight.dtype).removeprefix('torch.')}"
    return check_finite(weight, what, "nothing was written; a wider type may hold it").contiguous()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON, as transformers writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
