"""Both ways to multiply give the same product."""

import pytest
import torch

from npr_engine.model.linear import linear
from tests.support.errors import product_bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 31, 100, 255, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_does_not_depend_on_the_library(dtype: torch.dtype, rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    x, weight, add = randn(rows, 48), randn(17, 48), randn(17) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if add is None else add.double())
    bound = product_bound(x, weight, torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.bfloat16:
        bound = bound + 2.0**-8 * (exact.abs() + bound)  # the sum is rounded once to eight bits
    assert ((linear(x, weight, add).double() - exact).abs() <= bound).all()
