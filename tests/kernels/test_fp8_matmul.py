"""FP8 products on the GPU: the rounding is the CPU's, sums are as exact as they have to be."""

import itertools

import pytest
import torch

from megatron_npr.model.fp8_matmul import FORWARD, GRADIENTS, product
from npr_ext.ops.fp8 import quantize_both, quantize_transposed, transposed
from tests.support.fp8.tensors import scaled

pytestmark = pytest.mark.gpu
E4M3, E5M2 = FORWARD, GRADIENTS["hybrid"]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    ).bfloat16()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(5, 20), (300, 257), (0, 16)])
def test_the_gpu_rounds_as_the_cpu_does_in_both_layouts(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Its division may be one bit off: rarely another neighbour, nowhere more than a step."""
    x_RC = numbers(0, *shape)
    theirs, ours = scaled(x_RC, dtype), scaled(x_RC.cuda(), dtype)
    assert float(ours.scale) == float(theirs.scale)
    difference = (ours.values.cpu().view(torch.int8).int() - theirs.values.view(torch.int8).int()).abs()
    assert (
        int(difference.max() if x_RC.numel() else 0) <= 1
        and float(difference.float().sum()) <= 0.001 * x_RC.numel()
    )
    both = quantize_both(x_RC.cuda(), ours.scale, dtype)
    turned = quantize_transposed(x_RC.cuda(), ours.scale, dtype)
    expected = ours.values.view(torch.uint8)
    assert torch.equal(both[0].view(torch.uint8), expected)
    for each in (both[1], turned, transposed(ours.values)):
        assert each.is_contiguous() and torch.equal(each.view(torch.uint8), expected.t())


SHAPES = ((512, 1024, 256), (24, 40, 56), (7, 20, 9), (1, 16, 16), (0, 16, 32), (32, 0, 16))


@pytest.mark.parametrize("rows, inner, columns", SHAPES)
def test_products_on_the_gpu_are_those_of_the_rounded_numbers(rows: int, inner: int, columns: int) -> None:
    for left, dtype, fast in itertools.product((E4M3, E5M2), (torch.float32, torch.bfloat16), (True, False)):
        a, b = scaled(numbers(1, rows, inner).cuda(), left), scaled(numbers(2, columns, inner).cuda(), E4M3)
        terms = [each.values.double() * each.scale.double() for each in (a, b)]
        size = terms[0].abs() @ terms[1].abs().T
        ours = product(a, b, dtype, fast=fast)
        assert ours.shape == (rows, columns) and ours.dtype == dtype and ours.is_contiguous()
        # The tensor cores add numbers of 14 bits or so; bf16 has 8.
        error = (ours.double() - terms[0] @ terms[1].T).abs()
        assert bool((error <= (2.0**-10 + (2.0**-8 if dtype == torch.bfloat16 else 0)) * size).all())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_on_the_gpu_too_one_number_that_is_not_finite_makes_the_product_nan(broken: float) -> None:
    x_RC, other = numbers(3, 32, 64).cuda(), scaled(numbers(4, 16, 64).cuda(), E4M3)
    x_RC[2, 3] = broken
    for dtype in (E4M3, E5M2):
        assert bool(product(scaled(x_RC, dtype), other, torch.bfloat16).isnan().all())
