"""Megatron-Core on a CPU with gloo: the one place where its CUDA assumptions are met.

Megatron-Core names CUDA literally (`device="cuda"`, `.cuda()`, `torch.cuda.current_device()`, streams, the CUDA
random state, `Tensor.type()` strings). `cpu_runtime` is a context manager that answers those on the CPU for as long as it
is entered and restores everything on exit; the engine and our own mathematics run outside of it and pay nothing.

It is entered explicitly (`runtime.process_world.megatron_context`) and only where there is no GPU: importing
replaces nothing.
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

from megatron_npr.repairs import cpu_matmul
from megatron_npr.repairs.repair import Repair, Replacement, applied

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


_MEGATRON = "megatron-core==0.16.1"
_WHERE = "`megatron_on_cpu.cpu_runtime`, around calls into Megatron"


def _returning(answer: object) -> Callable[[Any], Any]:
    """For `Replacement.make`: a function that takes anything and gives this answer."""
    return lambda original: lambda *args, **kwargs: answer


def _on_cpu(symbol: str, stand_in: Callable[[Any], Any]) -> Replacement:
    return Replacement(
        symbol,
        _MEGATRON,
        "Megatron calls it whatever the device; without a GPU it fails",
        "Megatron does not name it, or asks for the device first",
        "`megatron_on_cpu.CUDA_CALLS`, around calls into Megatron",
        make=stand_in,
    )


_NO_STREAM = _NoStream()
CUDA_CALLS = (
    _on_cpu("torch.cuda:current_device", _returning(_CPU)),
    _on_cpu("torch.cuda:synchronize", _returning(None)),
    _on_cpu("torch.cuda:empty_cache", _returning(None)),
    _on_cpu("torch.cuda:Stream", lambda original: _NoStream),
    _on_cpu("torch.cuda:Event", lambda original: _NoStream),
    _on_cpu("torch.cuda:stream", lambda original: lambda stream: contextlib.nullcontext()),
    _on_cpu("torch.cuda:current_stream", _returning(_NO_STREAM)),
    _on_cpu("torch.cuda:default_stream", _returning(_NO_STREAM)),
    _on_cpu("torch.cuda:get_rng_state", lambda original: _get_rng_state),
    _on_cpu("torch.cuda:manual_seed", lambda original: torch.manual_seed),
    _on_cpu("megatron.core.tensor_parallel.random:_get_cuda_rng_state", lambda original: _get_rng_state),
    _on_cpu("megatron.core.tensor_parallel.random:_set_cuda_rng_state", lambda original: _set_rng_state),
    _on_cpu("torch.nn:Module.cuda", lambda original: lambda module, device=None: module),
)
"""Every CUDA entry point that Megatron calls outside of torch functions."""

SIZES_ON_THE_HOST = Replacement(
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
    _MEGATRON,
    "a tensor on the CPU stays one where all-to-all takes numbers as sizes",
    "it gives NumPy arrays where `as_numpy` asks for them, on any device",
    _WHERE,
    make=lambda original: _on_the_host,
)
CUDA_LITERALS = Repair(
    'torch.overrides:TorchFunctionMode, over `device="cuda"`, `.cuda()`, `Tensor.type()`, `matmul`',
    _MEGATRON,
    "Megatron names CUDA literally; and torch's own matrix products are slow on a CPU",
    "Megatron takes the device from the model; torch's are as fast as oneDNN's",
    "`megatron_on_cpu.CudaOnCpu`, around calls into Megatron",
)
RNG_WARNING = Repair(
    "logger megatron.core.tensor_parallel.random",
    _MEGATRON,
    'a warning each step: on a CPU "the CUDA generator" is the CPU\'s, so it always moves',
    "the tracker knows a CPU",
    _WHERE,
)
REPAIRS: tuple[Repair, ...] = (*CUDA_CALLS, SIZES_ON_THE_HOST, CUDA_LITERALS, RNG_WARNING)


class _DropRngWarning(logging.Filter):
    """Drops the tracker's warning: it restores the generator itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Within this context Megatron-Core's CUDA calls act on the CPU. Re-entrant."""
    rng_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    own = _DropRngWarning()  # one each time: an inner context's end leaves the outer one's
    rng_logger.addFilter(own)
    try:
        with applied(*CUDA_CALLS, SIZES_ON_THE_HOST), CudaOnCpu():
            yield
    finally:
        rng_logger.removeFilter(own)
