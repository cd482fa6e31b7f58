"""Attention over a branch layout: computes the pairs that are visible and no others, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npr_ext import library  # noqa: F401  (registers torch.ops.npr)
from npr_ext.layout.branch_layout import BranchLayout
from npr_ext.ops.flex import flex_branch_attention


class _BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_QNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: Tensor, scale: float) -> Tensor:
        output_QNH: Tensor
        output_QNH, log_sums_QN = torch.ops.npr.branch_attention_forward(q_QNH, k_TKH, v_TKH, plan, scale)
        ctx.save_for_backward(q_QNH, k_TKH, v_TKH, output_QNH, log_sums_QN, plan)
        ctx.scale = scale
        return output_QNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_QNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        dq, dk, dv = torch.ops.npr.branch_attention_backward(gradient_QNH, *ctx.saved_tensors, ctx.scale)
        return dq, dk, dv, None, None


def branch_attention(
    q_QNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: BranchLayout, *, scale: float | None = None
) -> Tensor:
    """Softmax attention in which every query sees what the layout lets it see. [Q, N, H], differentiable.

    Memory is O(T). On the CPU a hidden key is not read at all, so it moves neither output nor gradient of a
    query by even one bit, and results do not depend on the number of threads. On a GPU it is FlexAttention
    over the present tiles (ops/flex.py).

    Args:
        q_QNH: queries of the layout's last Q tokens (all T but in a shard), float32, float64 or bfloat16 (computed in float32
            then); any strides.
        k_TKH: keys; N is a multiple of K. Head-sharded (tensor-parallel) tensors simply have fewer heads.
        v_TKH: values.
        layout: layout of the row; what attention derives from it is derived once and shared by all layers.
        scale: factor of the scores; 1 / sqrt(H) if None.
    """
    factor = q_QNH.shape[-1] ** -0.5 if scale is None else scale
    if q_QNH.is_cuda:
        return flex_branch_attention(q_QNH, k_TKH, v_TKH, layout.bucket_mask, factor)
    output: Tensor = _BranchAttention.apply(q_QNH, k_TKH, v_TKH, layout.plan, factor)
    return output
