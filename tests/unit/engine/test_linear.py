"""Both ways to multiply give the same product."""

import pytest
import torch

from npr_engine.linear import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 31, 100, 255, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_does_not_depend_on_the_library(dtype: torch.dtype, rows: int, bias: bool) -> None:
    x, weight = torch.randn(rows, 48, dtype=dtype), torch.randn(17, 48, dtype=dtype)
    add = torch.randn(17, dtype=dtype) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if add is None else add.double())
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(linear(x, weight, add).double(), exact, rtol=0, atol=tolerance)
