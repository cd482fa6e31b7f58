"""Repairs of PyTorch: objects of a checkpoint that are unpickled without a limit, and threads beside gloo's."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch

from megatron_npr.repairs.repair import Repair, Replacement
from npr_ext.errors import UserError

_TORCH = "torch==2.13.0"


class HostileObjectError(UserError):
    """An object of a checkpoint is more than plain data; the message begins with its name there."""


def _read_plain(read: Callable[..., None]) -> Callable[..., None]:
    """Each object is read with `weights_only` before torch reads it without."""

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        try:
            torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise HostileObjectError(
                f"{read_item.dest_index.fqn} asks for more than plain data: it may be hostile"
            ) from None
        value.seek(0)
        read(self, read_item, value)

    return load_bytes


PLAIN_OBJECTS = Replacement(
    "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
    _TORCH,
    "it unpickles objects of a checkpoint without a limit: whoever wrote one runs code here",
    "it reads with weights_only=True",
    "`training/pickled_files.py`: `plain_objects`, around load",
    make=_read_plain,
)


def share_cores_with_gloo() -> None:
    """Threads that start from now on open no OpenMP team of their own; this thread keeps its number.

    gloo copies large buffers in threads of its own. Were each to open an OpenMP team, libgomp would count more threads than
    cores and put ours to sleep between any two operators: 2x the time of a decode step. The number of threads is a thread's
    own; threads that start later take the last one that anybody set.
    """
    setter = threading.Thread(target=torch.set_num_threads, args=(1,))
    setter.start()
    setter.join()


GLOO_THREADS = Repair(
    "torch:set_num_threads",
    _TORCH,
    "each of gloo's threads opens an OpenMP team: a decode step takes twice as long",
    "gloo's threads copy without OpenMP",
    "`pytorch.share_cores_with_gloo`, for the life of a run's process",
)

OUTSIDE = (
    Repair(
        "torch:_scaled_mm",
        _TORCH,
        "on a CPU it has another result, or none, by the processor",
        "it gives the product of the rounded numbers on every CPU",
        "`npr_ext/ops/scaled_mm.py`: `scaled_mm` multiplies in float32 there",
    ),
    Repair(
        "torch._dynamo.config:recompile_limit",
        _TORCH,
        "after 8 lengths of rows FlexAttention runs uncompiled",
        "every torch that is supported has torch.compile(recompile_limit=...)",
        "`npr_ext/ops/flex.py`: `compiled_attention`, around each call",
    ),
)
"""Met in npr_ext, which lies below this package."""

REPAIRS: tuple[Repair, ...] = (PLAIN_OBJECTS, GLOO_THREADS, *OUTSIDE)
