"""A checkpoint's pickles are read only where they hold plain data: nothing that a stranger wrote is called.

Megatron's format has three: `common.pt`, which torch reads with `weights_only`; torch's `.metadata`, which torch unpickles
without a limit, so it is read here first by an unpickler that knows the record classes of the format and nothing else; and the
objects among the tensors (layers have such, for Transformer Engine's state), which torch unpickles without a limit, too: each
is read with `weights_only` before. The tensors (`*.distcp`) are read by torch with `weights_only`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_npr.repairs.pytorch import PLAIN_OBJECTS, HostileObjectError
from megatron_npr.repairs.repair import applied
from npr_ext.errors import UserError

METADATA = ".metadata"
COMMON = "common.pt"
_UNSAFE_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((f"{_CHECKPOINT}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (f"{_CHECKPOINT}.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(("torch", dtype) for dtype in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8")),
}


def _enum_member(owner: Any, name: Any) -> Any:
    """What `getattr(owner, name)` gives where that is a member of an enumeration, the only use of it in a checkpoint."""
    if isinstance(owner, EnumMeta) and name in owner.__members__:
        return owner.__members__[name]
    raise UserError(f"asks for attribute {name!r} of {owner!r}, which no checkpoint needs: it may be hostile")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (
            "builtins",
            "getattr",
        ):  # so Python before 3.11.4 (Debian 12's) writes an enumeration's member
            return _enum_member
        if (module, name) not in _ALLOWED:
            raise UserError(f"asks for {module}.{name}, which no checkpoint needs: it may be hostile")
        return super().find_class(module, name)


def check_pickled_files(folder: Path) -> None:
    """UserError unless the checkpoint's pickled files can be read without running anything that they name."""
    if os.environ.get(_UNSAFE_SWITCH, "0") not in ("", "0"):
        raise UserError(f"{_UNSAFE_SWITCH} is set, which lets a checkpoint run code: unset it")
    try:
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {folder}: {COMMON} asks for more than plain data: it may be hostile"
        ) from None
    try:
        _PlainUnpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    except UserError as error:
        raise UserError(f"checkpoint {folder}: {METADATA} {error}") from None
    except Exception as error:  # a malformed pickle raises whatever its opcodes stumble over
        raise UserError(f"checkpoint {folder}: {METADATA} cannot be read: {error}") from None


@contextlib.contextmanager
def plain_objects(folder: Path) -> Iterator[None]:
    """Within this context torch reads no object of a checkpoint that is more than plain data: UserError, with its name."""
    try:
        with applied(PLAIN_OBJECTS):
            yield
    except CheckpointException as error:  # torch's collection of what happened on each rank
        found = next(
            (each for each, _ in error.failures.values() if isinstance(each, HostileObjectError)), None
        )
        if found is None:
            raise
        raise UserError(f"checkpoint {folder}: {found}") from None
