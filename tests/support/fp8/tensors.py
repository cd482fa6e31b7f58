"""Tensors in FP8 for the tests on the CPU and on a GPU."""

import torch

from megatron_npr.model.fp8_matmul import Scaled, largest_magnitude, rounded, scale_of


def scaled(x_RC: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """Rounded under a scale of its own."""
    scale = scale_of(largest_magnitude(x_RC), dtype)
    return Scaled(rounded(x_RC, scale, dtype), scale)
