"""Attention over a branch layout: computes the pairs that are visible and no others, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npr_ext import _C  # noqa: F401  (loading it registers torch.ops.npr)
from npr_ext.layout import BranchLayout


class _BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: Tensor, scale: float) -> Tensor:
        output_TNH: Tensor
        output_TNH, log_sums_TN = torch.ops.npr.branch_attention_forward(q_TNH, k_TKH, v_TKH, plan, scale)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, output_TNH, log_sums_TN, plan)
        ctx.scale = scale
        return output_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        dq, dk, dv = torch.ops.npr.branch_attention_backward(gradient_TNH, *ctx.saved_tensors, ctx.scale)
        return dq, dk, dv, None, None


def branch_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: BranchLayout, *, scale: float | None = None
) -> Tensor:
    """Softmax attention in which every query sees what the layout lets it see. [T, N, H], differentiable.

    Memory is O(T). A hidden key is not read at all, so it moves neither output nor gradient of a query by even one bit.
    Results and gradients do not depend on the number of threads.

    Args:
        q_TNH: queries, float32, float64 or bfloat16 (computed in float32 then); any strides.
        k_TKH: keys; N is a multiple of K. Head-sharded (tensor-parallel) tensors simply have fewer heads.
        v_TKH: values.
        layout: layout of the row; its plan is derived once and shared by all layers.
        scale: factor of the scores; 1 / sqrt(H) if None.
    """
    factor = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _BranchAttention.apply(q_TNH, k_TKH, v_TKH, layout.plan, factor)
    return output
