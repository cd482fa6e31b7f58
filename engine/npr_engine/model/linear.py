"""x @ W.T by whatever is fastest for the number of rows.

A decode step has 1 to some hundred rows: our own operator reads the weight from where it lies, where a
library's GEMM packs it first. A prefill chunk or a training batch has more: oneDNN. (PyTorch's CPU build
calls MKL, which on processors of other vendors keeps to 256-bit vectors.) Measured on one Zen 5 core, 3072
outputs of 576 features from memory, in us for MKL / oneDNN / ours in float32: 1 row 413 / 233 / 193, 16 rows
910 / 564 / 268, 64 rows 2416 / 1197 / 878, 512 rows 15997 / 7258 / 8131; for oneDNN / ours in bfloat16: 1 row
220 / 114, 16 rows 304 / 144, 64 rows 616 / 461, 512 rows 3707 / 4031.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_engine.model.fp8 import Fp8Weight, fp8_linear
from npr_ext import linear as rows_linear

ROWS_OF_A_STEP = 256
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


Weight: TypeAlias = Tensor | Fp8Weight


def linear(x_TC: Tensor, weight_DC: Weight, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D]."""
    if isinstance(weight_DC, Fp8Weight):
        return fp8_linear(x_TC, weight_DC, bias_D)
    if x_TC.device.type == "cpu":
        if len(x_TC) < ROWS_OF_A_STEP:
            return rows_linear(x_TC, weight_DC, bias_D)
        if HAS_ONEDNN and x_TC.dtype == torch.float32:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TC, weight_DC, bias_D, "none", [], "")
            return product
    return F.linear(x_TC, weight_DC, bias_D)
