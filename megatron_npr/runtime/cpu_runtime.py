"""Run Megatron-Core on CPU with gloo: the one place where its CUDA assumptions are met.

Megatron-Core 0.16.1 names CUDA literally (`device="cuda"`, `.cuda()`, `torch.cuda.current_device()`, streams, the CUDA
random state, `Tensor.type()` strings). `CpuRuntime` is a context manager that answers those on the CPU for as long as it
is entered and restores everything on exit; the engine and our own mathematics run outside of it and pay nothing.

It is entered explicitly (see `parallel.megatron_context`) and only where there is no GPU: nothing is patched at import.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from megatron_npr.runtime import cpu_matmul

_CPU = torch.device("cpu")
_CUDA_TYPE_OF = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


_MATMULS = frozenset((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__))
_REWRITTEN = _MATMULS | {torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to}


class CudaOnCpu(TorchFunctionMode):
    """Rewrites every CUDA device argument to the CPU, and answers `Tensor.type()` with the CUDA name."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _REWRITTEN and "device" not in kwargs:  # nearly all: some 5,000 calls a training step
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func in _MATMULS and len(args) == 2 and cpu_matmul.takes(*args):
            return cpu_matmul.product(*args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(args[0])
            return _CUDA_TYPE_OF.get(name, name)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """Stands where Megatron wants a CUDA stream or event: the CPU runs in program order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _NoStream:
        return self

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _on_the_host(
    tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False
) -> torch.Tensor | NDArray[np.int64] | None:
    """Megatron's `maybe_move_tensor_to_cpu`, which leaves what is on the CPU as it is: all-to-all takes no tensor as sizes.

    Not left to `CudaOnCpu`, which torch switches off within a nested backward: that of recomputed layers.
    """
    return tensor.numpy() if as_numpy and tensor is not None else tensor


def _redirections() -> list[tuple[object, str, object]]:
    """(owner, attribute, replacement) for every CUDA entry point that Megatron calls outside torch functions."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    no_stream = _NoStream()

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    def one_stream(*args: object, **kwargs: object) -> _NoStream:
        return no_stream

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", nothing),
        (torch.cuda, "empty_cache", nothing),
        (torch.cuda, "Stream", _NoStream),
        (torch.cuda, "Event", _NoStream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", one_stream),
        (torch.cuda, "default_stream", one_stream),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (megatron_random, "_get_cuda_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _on_the_host),
        (torch.nn.Module, "cuda", lambda module, device=None: module),
    ]


def _drop_rng_warning(record: logging.LogRecord) -> bool:
    # On the CPU "the CUDA generator" IS the CPU generator, so the tracker always sees it move; it restores it itself.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Within this context Megatron-Core's CUDA calls act on the CPU. Re-entrant."""
    rng_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    saved: list[tuple[object, str, object]] = []
    rng_logger.addFilter(_drop_rng_warning)
    try:
        for owner, name, replacement in _redirections():
            saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
        with CudaOnCpu():
            yield
    finally:
        for owner, name, original in reversed(saved):
            setattr(owner, name, original)
        rng_logger.removeFilter(_drop_rng_warning)
