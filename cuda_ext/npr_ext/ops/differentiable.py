"""The element-wise work of a decoder layer with gradients: on the CPU one pass over memory each way.

Composed of PyTorch's operators it is a dozen passes there, half as long as a narrow model's matrix products.
T tokens, D hidden, F feed-forward; float32, float64 or bfloat16 (then computed in float32, rounded once at
the end). CUDA tensors go to PyTorch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from npr_ext.ops import decoder


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return decoder.rms_norm(x_TD, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        return (*torch.ops.npr.rms_norm_backward(gradients[0], x_TD, weight_D, ctx.eps), None)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        return decoder.silu_mul(gate_up_TF)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up_TF,) = ctx.saved_tensors
        gradient_TF: Tensor = torch.ops.npr.silu_mul_backward(gradients[0], gate_up_TF)
        return gradient_TF


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019) over the last dim, [..., D]."""
    if x.device.type == "cuda":
        return functional.rms_norm(x, weight_D.shape, weight_D, eps)
    normed: Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), weight_D, eps)
    return normed.view(x.shape)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] (SwiGLU, Shazeer 2020), [..., F] from [..., 2F]."""
    if gate_up.device.type == "cuda":
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
    product: Tensor = _SiluMul.apply(gate_up.reshape(-1, gate_up.shape[-1]))
    return product.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
