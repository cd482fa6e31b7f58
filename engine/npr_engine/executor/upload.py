"""From the host's arrays to the model's device without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on the host that `device` can copy by itself; for a CPU it shares the array's memory.

    Copies from other host memory make the host wait until all that was queued before them has run. Torch's
    allocator keeps pinned memory until the copies that were queued from it are done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, in the order of the current stream; the host goes on at once."""
    return pinned(array, device).to(device, non_blocking=True)
