"""x @ W.T by the library that is faster for the number of rows.

PyTorch's CPU build multiplies float32 matrices with MKL, which on processors of other vendors keeps to
256-bit vectors; oneDNN (in the same build) uses all of them: 2x at 64 rows and more. Its fixed cost of
about 8 us a call is too much for few rows. Measured on a Zen 5 core, 128 x 768: 32 rows 62 against 41 us,
128 rows 225 against 112 us. Both read the weight where it lies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_WORTH_ONEDNN = 32
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D]."""
    if (
        _HAS_ONEDNN
        and len(x_TC) >= ROWS_WORTH_ONEDNN
        and x_TC.dtype == torch.float32
        and x_TC.device.type == "cpu"
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TC, weight_DC, bias_D, "none", [], "")
        return product
    return F.linear(x_TC, weight_DC, bias_D)
