"""The safetensors of a Hugging Face folder: which files count, and what is in them, without reading a tensor.

model.safetensors.index.json, else model.safetensors ──► TensorFiles ──► shape and number format of each tensor ──► open()

With an index the files that it names are read and no others: folders keep a stray model.safetensors of another model, an
adapter, weights in another layout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_npr.sharding.model_files import read_object, refuse_pointer, some
from npr_ext.errors import UserError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
FORMATS = ("F64", "F32", "BF16", "F16")
"""Number formats that weights may have; all others are of quantised models."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape and safetensors' name of its number format."""

    path: Path
    shape: tuple[int, ...]
    format: str


class TensorFiles:
    """What the safetensors of a folder hold, by name; UserError where a file is missing, damaged or none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            self.tensors = _indexed(folder)
        elif (folder / WHOLE).exists():
            self.tensors = _stored(folder / WHOLE)
        else:
            raise UserError(_why_none(folder))
        self._files: dict[Path, Any] = {}

    def open(self, name: str) -> Any:
        """The open file that holds a tensor (safetensors' handle for torch); each is opened once."""
        path = self.tensors[name].path
        if path not in self._files:
            self._files[path] = safe_open(str(path), framework="pt")
        return self._files[path]

    def close(self) -> None:
        self._files.clear()


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors that would be read."""
    return (folder / INDEX).exists() or (folder / WHOLE).exists()


def check_tensors(
    folder: Path, found: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    """UserError unless the tensors are those of the model that config.json describes, by name, shape and format.

    `tied`: the output matrix is the embedding, and may be stored once more. Tables of angles, which old versions of
    transformers stored, count for nothing.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{folder} lacks {some(missing)}: {_remedy(missing)}")
    strange = [name for name in found if name not in wanted and not _surplus(name, tied)]
    if strange:
        raise UserError(f"{folder} holds {some(strange)}, which config.json's model has no place for")
    shapes = {**wanted, **({"lm_head.weight": wanted["model.embed_tokens.weight"]} if tied else {})}
    for name, stored in found.items():
        if name in shapes and stored.shape != shapes[name]:
            raise UserError(f"{folder}: {name} has shape {stored.shape}, config.json asks for {shapes[name]}")
        if name in shapes and stored.format not in FORMATS:
            raise UserError(
                f"{folder}: {name} is stored as {stored.format}: convert the model before it was quantised"
            )


def _remedy(missing: list[str]) -> str:
    if missing == ["lm_head.weight"]:
        return "copy the file that has it, or set tie_word_embeddings to true in config.json if it is the embedding"
    return "files are missing, or config.json is another model's"


def _surplus(name: str, tied: bool) -> bool:
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _indexed(folder: Path) -> dict[str, Stored]:
    path = folder / INDEX
    file_of = read_object(path).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{path} has no weight_map from tensors to files: copy it again")
    files = sorted(set(file_of.values()))
    elsewhere = [file for file in files if Path(file).name != file]
    if elsewhere:
        raise UserError(f"{path} names {some(elsewhere)}: files have to lie beside it")
    absent = [file for file in files if not (folder / file).exists()]
    if absent:
        tensors = sorted(name for name, file in file_of.items() if file in absent)
        raise UserError(
            f"{folder} lacks {some(absent)}, which {INDEX} names for {some(tensors)}: copy what is missing"
        )
    if (folder / WHOLE).exists() and WHOLE not in files:
        _say_unread(folder)
    stored = {file: _stored(folder / file) for file in files}
    lost = [name for name, file in file_of.items() if name not in stored[file]]
    if lost:
        raise UserError(f"{folder} lacks {some(lost)}: {file_of[lost[0]]} is not the file that {INDEX} means")
    return {name: stored[file][name] for name, file in file_of.items()}


def _say_unread(folder: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(
            f"npr: {folder}/{WHOLE} is not read: {INDEX} does not name it (transformers would read it alone; remove one)",
            file=sys.stderr,
            flush=True,
        )


def _stored(path: Path) -> dict[str, Stored]:
    """The header of one file."""
    refuse_pointer(path)
    try:
        with safe_open(str(path), framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: Stored(path, tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from None


def _why_none(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    by_kind = {
        (".safetensors",): f"neither {WHOLE} nor {INDEX}: copy the index too",
        (".bin", ".pt", ".pth"): "pickled weights, which are never read: save the model as safetensors",
        (".gguf",): "no safetensors: npr convert --from-gguf FILE makes them",
    }
    for endings, rest in by_kind.items():
        fitting = [name for name in names if name.endswith(endings)]
        if fitting:
            return f"{folder} has {some(fitting)} and {rest}"
    return f"{folder} has no *.safetensors: name a Hugging Face folder"
