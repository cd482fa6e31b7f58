"""Whether a KV cache fits the memory of its device at all: asked before the first list of its slots is made, since what asks
for a thousand times the memory that is there ends with a traceback, or takes the machine down without a word."""

from __future__ import annotations

import os

import torch

from npr_ext.errors import UserError

GIB = 1 << 30


def require_kv_memory(num_slots: int, bytes_per_slot: int, device: torch.device, *, setting: str) -> None:
    """UserError, naming the setting, where the slots take more than all the memory of the device."""
    need, there = num_slots * bytes_per_slot, device_memory(device)
    if need > there:
        what = "this GPU" if device.type == "cuda" else "this machine"
        raise UserError(
            f"{setting} = {num_slots}: their keys and values take {need / GIB:,.0f} GiB, {what} has "
            f"{there / GIB:,.0f}: lower it"
        )


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
