"""x @ W.T by whatever is fastest for the number of rows.

PyTorch's CPU build multiplies float32 matrices with MKL, which on processors of other vendors keeps to
256-bit vectors and packs the weight at each call. A decode step has few rows: our own operator reads each
weight once, from where it lies. A prefill has many: oneDNN (in the same build) uses the whole vector, for a
fixed cost of about 8 us a call. Measured on a Zen 5 core, the four products of a layer of 117 k weights:
1 row 11 us (MKL), 4 rows 14 against 21 us, 64 rows 106 against 138 us. All read the weight where it lies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_ext import few_rows_linear

FEW_ROWS = range(2, 32)
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D]."""
    if x_TC.device.type == "cpu":
        if len(x_TC) in FEW_ROWS:
            return few_rows_linear(x_TC, weight_DC, bias_D)
        if _HAS_ONEDNN and len(x_TC) >= FEW_ROWS.stop and x_TC.dtype == torch.float32:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TC, weight_DC, bias_D, "none", [], "")
            return product
    return F.linear(x_TC, weight_DC, bias_D)
