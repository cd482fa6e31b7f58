"""A checkpoint's pickled files are read only where they hold plain data: nothing that a stranger wrote is called.

Megatron's format has two: `common.pt`, which torch reads with `weights_only`, and torch's `.metadata`, which torch unpickles
without a limit. The latter is read here first by an unpickler that knows the record classes of the format and nothing else.
The tensors (`*.distcp`) are read by torch with `weights_only`.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

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


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
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
