"""Tensors in FP8 for the tests on the CPU and on a GPU."""

import torch

from megatron_npr.model.fp8_matmul import Scaled
from npr_ext.ops.fp8 import amax, quantize, scale_of


def scaled(x_RC: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """Rounded under a scale of its own."""
    scale = scale_of(amax(x_RC), dtype)
    return Scaled(quantize(x_RC, scale, dtype), scale)
