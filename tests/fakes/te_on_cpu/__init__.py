"""NVIDIA's Transformer Engine on the CPU: its real Python code over a stand-in of its compiled half.

    TE's Python (the wheel transformer-engine, as it is) ──► transformer_engine_torch ──► kernels of a GPU
                                                             └─ here: plain PyTorch, one small function for each

The stand-in imitates a Hopper GPU (compute capability 9.0): FP8 products exist as TN alone, so that an operand which is needed
columnwise must be there as a transposed copy, and inner dimensions are multiples of 16; both are asserted, as cuBLAS refuses
them. Numbers are rounded to FP8 as there, products are those of the rounded numbers in fp32. What nobody called is not written
and says so when it is called.

TE cannot be imported without its compiled half, so it lies beside the installed packages (`make setup`), and a process that
wants it calls `install` before it imports Megatron. That process sees TE for good: start a worker for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

FOLDER = Path(sys.prefix) / "transformer-engine"
"""Where `make setup` puts Transformer Engine's Python and what that imports."""

HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a stand-in of a GPU")


def skip_where_absent() -> None:
    """Skip the test that calls this where Transformer Engine's Python was not installed."""
    if not FOLDER.is_dir():
        pytest.skip(f"Transformer Engine's Python is not in {FOLDER}: make setup puts it there")


def install() -> None:
    """Make `transformer_engine` importable, on a CPU that answers as a GPU where TE asks; before Megatron is imported."""
    assert "megatron.core" not in sys.modules, (
        "Megatron has already found that there is no Transformer Engine"
    )
    sys.path.append(str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE: do not look for CUDA's libraries
    _answer_as_a_gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the compiled half is missing
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = _load_the_stand_in

    from megatron_npr.repairs.megatron_on_cpu import CudaOnCpu

    with CudaOnCpu():
        import transformer_engine.pytorch.distributed
        from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    transformer_engine.pytorch.distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    transformer_engine.pytorch.distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(
        state
    )
    # What is refused on a CPU by name: to build a module and to run one.
    _with_answer(TransformerEngineBaseModule, "__init__", torch.cuda, "is_available", lambda: True)
    _with_answer(TransformerEngineBaseModule, "prepare_forward", torch.Tensor, "is_cuda", True)
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = _one_by_one
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _at_once(vars(param_and_grad_buffer)[name]))


@contextlib.contextmanager
def _one_by_one(*_: object, **__: object) -> Iterator[SimpleNamespace]:
    """Megatron gathers bf16 and FP8 weights in one call; gloo reads all of them as numbers of one type."""
    yield SimpleNamespace(wait=lambda: None)


def _at_once(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Ends before it returns, also where the caller would wait for it later."""

    def ended(*args: Any, async_op: bool = False, **kwargs: Any) -> None:
        collective(*args, **kwargs)

    return ended


def _answer_as_a_gpu() -> None:
    torch.version.cuda = "13.0"
    torch.cuda.get_device_properties = lambda *_: HOPPER
    torch.cuda.get_device_capability = lambda *_: (HOPPER.major, HOPPER.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True


def _load_the_stand_in(framework: str) -> None:
    assert framework == "torch"
    stand_in = importlib.import_module("tests.fakes.te_on_cpu.transformer_engine_torch")
    sys.modules["transformer_engine_torch"] = stand_in


def _with_answer(owner: type, method: str, place: object, name: str, answer: object) -> None:
    """`owner.method`, during which `place.name` is `answer`."""
    original: Callable[..., Any] = vars(owner)[method]

    @functools.wraps(original)
    def answered(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(place, name, answer):
            return original(*args, **kwargs)

    setattr(owner, method, answered)
