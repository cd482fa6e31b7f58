"""Products with a weight matrix for a decode step's few rows."""

import torch
from torch import Tensor

from npr_ext import _C  # noqa: F401  (loading it registers torch.ops.npr)


def few_rows_linear(x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D]; right for any T, meant for 2 to 31 rows.

    Args:
        x_TC: float32, float64 or bfloat16 (then accumulated in float32).
        weight_DC: of x's type; each row is read once, from where it lies.
        bias_D: of x's type.

    Raises:
        ValueError: a shape or type that does not fit.
    """
    product: Tensor = torch.ops.npr.few_rows_linear(x_TC, weight_DC, bias_D)
    return product
