"""x @ W.T by whatever is fastest for the number of rows.

A decode step has 1 to some hundred rows: our own operator reads the weight from where it lies, where a library's
GEMM packs it first. A prefill chunk or a training batch has more: oneDNN. (PyTorch's CPU build calls MKL, which on
processors of other vendors keeps to 256-bit vectors.) Measured on a Zen 5 core, the four products of a layer of
117 k weights, in us for MKL / oneDNN / ours: 4 rows 20 / 52 / 14, 64 rows 137 / 101 / 77, 512 rows 1019 / 482 / 569.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_engine.fp8 import Fp8Weight, fp8_linear
from npr_ext import linear as rows_linear

ROWS_OF_A_STEP = 256
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


Weight: TypeAlias = Tensor | Fp8Weight


def linear(x_TC: Tensor, weight_DC: Weight, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D]."""
    if isinstance(weight_DC, Fp8Weight):
        return fp8_linear(x_TC, weight_DC, bias_D)
    if x_TC.device.type == "cpu":
        if len(x_TC) < ROWS_OF_A_STEP:
            return rows_linear(x_TC, weight_DC, bias_D)
        if _HAS_ONEDNN and x_TC.dtype == torch.float32:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TC, weight_DC, bias_D, "none", [], "")
            return product
    return F.linear(x_TC, weight_DC, bias_D)
