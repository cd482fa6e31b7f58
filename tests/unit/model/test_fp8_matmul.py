"""Rounding to FP8 and the product: against a list of all FP8 numbers and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_npr.model.fp8_matmul import FORWARD, GRADIENTS, product
from npr_ext.ops.fp8 import amax, quantize, quantize_both, quantize_transposed, scale_of, transposed
from tests.support.fp8.tensors import scaled
from tests.support.fp8.truth import E4M3, E5M2, quantised
from tests.support.fp8.truth import scale_of as true_scale

FORMATS = {FORWARD: E4M3, GRADIENTS["hybrid"]: E5M2}


def wide_numbers(seed: int, *shape: int) -> torch.Tensor:
    """From the format's subnormal numbers to its largest ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp()


def test_the_formats_have_the_numbers_that_pytorch_has() -> None:
    for dtype, form in FORMATS.items():
        codes = torch.arange(len(form.numbers), dtype=torch.uint8).view(dtype)
        assert np.array_equal(codes.double().numpy(), form.numbers)
        assert torch.finfo(dtype).max == form.largest


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
def test_every_number_is_rounded_to_the_nearest_of_the_format(dtype: torch.dtype, of: torch.dtype) -> None:
    form = FORMATS[dtype]
    halves = torch.from_numpy((form.numbers[1:] + form.numbers[:-1]) / 2).float()  # ties, under scale 1
    for x_RC in (wide_numbers(0, 33, 50), torch.cat((halves, -halves, torch.tensor([form.largest])))[None]):
        given = x_RC.to(of)
        one = scaled(given, dtype)
        truth = given.double().numpy()
        assert float(one.scale) == true_scale(truth, form)
        assert np.array_equal(one.values.double().numpy() * float(one.scale), quantised(truth, form))


def test_the_transposes_hold_the_same_numbers() -> None:
    x_RC = wide_numbers(1, 7, 20)
    scale = scale_of(amax(x_RC), FORWARD)
    values = quantize(x_RC, scale, FORWARD)
    rows, columns = quantize_both(x_RC, scale, FORWARD)
    for turned in (columns, quantize_transposed(x_RC, scale, FORWARD), transposed(values)):
        assert turned.shape == (20, 7) and turned.is_contiguous()
        assert torch.equal(turned.view(torch.uint8), values.view(torch.uint8).t())
    assert torch.equal(rows.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(
    "rows, inner, columns", [(32, 48, 64), (5, 20, 7), (1, 1, 1), (16, 33, 16), (3, 2000, 9)]
)
@pytest.mark.parametrize("fast", [True, False])
def test_a_product_is_that_of_the_rounded_numbers(rows: int, inner: int, columns: int, fast: bool) -> None:
    """Products of any shape, e4m3 and e5m2 on the left, in float32 and rounded once more in bf16."""
    for dtype in FORMATS:
        left, right = wide_numbers(2, rows, inner), wide_numbers(3, columns, inner)
        a, b = scaled(left, dtype), scaled(right, FORWARD)
        terms = quantised(left.double().numpy(), FORMATS[dtype]), quantised(right.double().numpy(), E4M3)
        expected, size = terms[0] @ terms[1].T, np.abs(terms[0]) @ np.abs(terms[1]).T
        ours = product(a, b, torch.float32, fast=fast)
        assert ours.shape == (rows, columns) and ours.is_contiguous()
        assert (np.abs(ours.double().numpy() - expected) <= 1e-6 * size).all()
        in_bf16 = product(a, b, torch.bfloat16, fast=fast).double().numpy()
        assert (np.abs(in_bf16 - expected) <= 2.0**-8 * np.abs(expected) + 1e-6 * size).all()


def test_zeros_have_scale_one_and_so_have_numbers_too_small_for_one() -> None:
    for x_RC in (torch.zeros(3, 4), torch.full((3, 4), 1e-42), torch.zeros(0, 4)):
        one = scaled(x_RC, FORWARD)
        assert float(one.scale) == 1.0 and float(one.values.float().abs().sum()) == 0.0
    small = scaled(torch.tensor([[1e-30, -3e-31]]), FORWARD)
    assert float(small.scale) == pytest.approx(1e-30 / 448) and small.values[0, 0].float() == 448.0


def test_products_without_rows_or_terms_are_empty_or_zero() -> None:
    some = scaled(torch.ones(4, 16), FORWARD)
    assert product(scaled(torch.ones(0, 16), FORWARD), some, torch.float32).shape == (0, 4)
    no_terms = product(scaled(torch.ones(3, 0), FORWARD), scaled(torch.ones(4, 0), FORWARD), torch.bfloat16)
    assert no_terms.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_makes_the_whole_product_nan(dtype: torch.dtype, broken: float) -> None:
    x_RC, other = wide_numbers(4, 6, 32), scaled(wide_numbers(5, 16, 32), FORWARD)
    x_RC[2, 3] = broken
    assert product(scaled(x_RC, dtype), other, torch.float32).isnan().all()
