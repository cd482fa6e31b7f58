"""npr::linear against float64, by every instruction set of this processor."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npr_ext import linear
from npr_ext.library import cpu_isas
from npr_ext.testing import using_isa

SEEDS = st.integers(0, 10**6)
ISAS = st.sampled_from(cpu_isas())
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
# All kinds of tiles: 1 to 6 rows, panels of 1 to 3 vectors, and what is left over at each edge.
ROWS = st.one_of(st.integers(1, 10), st.integers(11, 130))
INSIDE = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 129, 576, 1536]))
OUTSIDE = st.one_of(st.integers(1, 40), st.sampled_from([127, 192, 1025]))


def embedded(seed: int, dtype: torch.dtype, rows: int, size: int) -> Tensor:
    """A random matrix between NaNs: whatever is read beyond it spoils the result."""
    around = torch.full((rows + 2, size), torch.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    around[1:-1] = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype)
    return around[1:-1]


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@settings(max_examples=200, deadline=None)
@given(SEEDS, DTYPES, ROWS, INSIDE, OUTSIDE, st.booleans(), ISAS)
def test_sums_are_in_float32_and_rounded_once(
    seed: int, dtype: torch.dtype, rows: int, inside: int, outside: int, biased: bool, isa: str
) -> None:
    x, weight = embedded(seed, dtype, rows, inside), embedded(seed + 1, dtype, outside, inside)
    bias = embedded(seed + 2, dtype, 1, outside)[0] if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = F.linear(
        x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    with using_isa(isa):
        product = linear(x, weight, bias)
    assert product.dtype == dtype
    # Half a unit in the last place of the result, and at most a rounding of float32 for every addition.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + magnitude * (inside + 1) * 2**-24
    assert ((product.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16, 32, 33, 64])
@pytest.mark.parametrize("inside", [575, 576, 1536])
def test_the_error_is_at_most_twice_that_of_pytorch(
    inside: int, rows: int, dtype: torch.dtype, isa: str
) -> None:
    x, weight = embedded(rows, dtype, rows, inside), embedded(inside, dtype, 500, inside)
    exact = F.linear(x.double(), weight.double())
    with using_isa(isa):
        ours = linear(x, weight)
    theirs = F.linear(x, weight)
    assert rms(ours.double() - exact) <= 2 * rms(theirs.double() - exact)


@settings(max_examples=200, deadline=None)
@given(
    SEEDS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), INSIDE, OUTSIDE, ISAS, st.data()
)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(
    seed: int, dtype: torch.dtype, inside: int, outside: int, isa: str, data: st.DataObject
) -> None:
    rows = data.draw(st.one_of(ROWS, st.integers(131, 700)), "rows")
    first = data.draw(st.integers(0, rows - 1), "first")
    count = data.draw(st.one_of(st.integers(1, 8), st.integers(1, rows)), "count")
    part = slice(first, min(rows, first + count))
    x, weight = embedded(seed, dtype, rows, inside), embedded(seed + 1, dtype, outside, inside)
    bias = embedded(seed + 2, dtype, 1, outside)[0]
    with using_isa(isa):
        assert torch.equal(linear(x[part], weight, bias), linear(x, weight, bias)[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 33, 100])
def test_every_number_of_threads_gives_the_same_bits(dtype: torch.dtype, rows: int) -> None:
    x, weight = embedded(0, dtype, rows, 257), embedded(1, dtype, 2051, 257)
    before = torch.get_num_threads()
    try:
        products = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            products.append(linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_a_nan_or_an_infinity_stays_in_its_row_and_output(dtype: torch.dtype, rows: int) -> None:
    x, weight = embedded(0, dtype, rows, 65), embedded(1, dtype, 30, 65)
    clean = linear(x, weight)
    weight = weight.clone()
    weight[7, 64], weight[11, 3] = torch.nan, torch.inf
    product = linear(x, weight)
    assert product[:, 7].isnan().all()
    assert product[:, 11].isinf().all()
    kept = [d for d in range(30) if d not in (7, 11)]
    assert torch.equal(product[:, kept], clean[:, kept])
