"""The product of FP8 matrices on a CPU: exact where float32 is, the same on every processor, as strict as a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npr_ext.ops.scaled_mm import scaled_mm

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2))
ONE = torch.ones(())


def finite_numbers(dtype: torch.dtype) -> torch.Tensor:
    """In the first of 16 columns, zeros in the others; as many rows as 16 divides."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    column = torch.where(numbers.isfinite(), numbers, 0.0)[:, None]
    return torch.nn.functional.pad(column, (0, 15)).to(dtype)


@pytest.mark.parametrize("left, right", PAIRS)
def test_the_product_of_any_two_numbers_is_exact(left: torch.dtype, right: torch.dtype) -> None:
    a, b = finite_numbers(left), finite_numbers(right)
    exact = a[:, :1].double() @ b[:, :1].double().t()
    assert torch.equal(scaled_mm(a, b.t(), ONE, ONE, torch.float32).double(), exact)
    halved = scaled_mm(a, b.t(), ONE / 2, ONE * 4, torch.bfloat16)
    assert torch.equal(halved, (exact * 2).float().bfloat16())


@pytest.mark.parametrize("left, right", PAIRS)
def test_sums_that_float32_holds_are_exact_under_scales_of_matrices_and_of_rows(
    left: torch.dtype, right: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((37, 512), (48, 512)))
    rows, columns = 2.0 ** torch.arange(-18, 19)[:, None], 2.0 ** torch.arange(-24, 24)[None, :]
    exact = a.double() @ b.double().t()
    for scale_a, scale_b in ((ONE, ONE), (rows, columns)):
        ours = scaled_mm(a.to(left), b.to(right).t(), scale_a, scale_b, torch.float32)
        assert torch.equal(ours.double(), exact * scale_a.double() * scale_b.double())


class Calls(TorchDispatchMode):
    """Names of the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_cpu_needs_no_fp8_product_of_torch_or_onednn() -> None:
    """Both of torch's: which of them runs, and whether it does, depends on the processor and on ONEDNN_MAX_CPU_ISA."""
    for (left, right), dtype in itertools.product(PAIRS, (torch.float32, torch.bfloat16)):
        with Calls() as calls:
            scaled_mm(torch.ones(8, 32).to(left), torch.ones(16, 32).to(right).t(), ONE, ONE, dtype)
        assert "mm" in calls.names and not [name for name in calls.names if "scaled" in name]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(E4M3)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (ones(32, 8).t(), ones(16, 32).t(), "a has to be row-major"),
        (ones(8, 64)[:, ::2], ones(16, 32).t(), "a has to be row-major"),
        (ones(8, 64)[:, :32], ones(16, 32).t(), "a has to be row-major"),
        (ones(8, 32), ones(32, 16), "b has to be column-major"),
        (ones(8, 32), ones(16, 64)[:, :32].t(), "b has to be column-major"),
        (ones(8, 24), ones(16, 24).t(), r"\[24, 16\]: no multiples of 16"),
        (ones(8, 32), ones(7, 32).t(), r"\[32, 7\]: no multiples of 16"),
    ],
)
def test_a_cpu_refuses_the_layouts_that_a_gpu_refuses(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        scaled_mm(a, b, ONE, ONE, torch.float32)


def test_two_matrices_of_e5m2_are_refused() -> None:
    with pytest.raises(AssertionError, match="no product of two e5m2 matrices"):
        scaled_mm(torch.ones(8, 32).to(E5M2), torch.ones(16, 32).to(E5M2).t(), ONE, ONE, torch.float32)
