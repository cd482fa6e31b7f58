"""Megatron's column- and row-parallel linear layers with FP8 products, for GPUs without Transformer Engine.

    forward   x, W ─► scales (largest of the tensor group) ─► x in e4m3 ─► gathered under sequence parallelism ─► y = x W^T
    backward  dy ─► scale ─► dx = dy W ─► reduced in the background, meanwhile dW = dy^T x ─► main_grad, or autograd

Parameters, their names, checkpoints and the bf16 or fp32 results are Megatron's; weights keep their type, a copy in FP8 lives
for one product. The scales are those of whole tensors, whichever rank holds which part, so any tensor-parallel size rounds
alike: a scalar or two are reduced at each product. They are of the tokens of one micro-batch on one context-parallel rank.

Shape legend: S tokens of this rank, T those of the tensor group (S without sequence parallelism), K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_npr.model.fp8_matmul import FORWARD, GRADIENTS, Fp8Format, Scaled, product
from npr_ext.ops.fp8 import amax, quantize, quantize_both, quantize_transposed, scale_of, transposed


@dataclass
class LinearConfig(TransformerConfig):
    """Megatron's configuration and the format of the layers below; its own `fp8` means Transformer Engine's modules."""

    scaled_mm: Fp8Format | None = None


@dataclass(frozen=True)
class Sharing:
    """What the tensor group shares of a product: parts of x along the tokens (`gathers`), of dx as sums (`reduces`; never
    both), of dy along its columns (`splits_outputs`). `fused`: dW goes to the weight's `main_grad`, if it has one."""

    group: dist.ProcessGroup
    gradient_type: torch.dtype
    gathers: bool
    reduces: bool
    splits_outputs: bool
    fused: bool


class _Fp8Linear(torch.autograd.Function):
    """[S, ..., K] x [N, K] -> [T, ..., N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, sharing: Sharing) -> Tensor:
        x_SK = x.reshape(-1, x.shape[-1])
        magnitudes = _amax((x_SK, weight_NK), sharing.group)
        x_scale, weight_scale = scale_of(magnitudes, FORWARD).unbind()
        values_SK = quantize(x_SK, x_scale, FORWARD)
        # Not the transpose, although backward wants that: under sequence parallelism a part is kept and gathered again.
        ctx.save_for_backward(values_SK, x_scale, weight_NK, weight_scale)
        ctx.sharing, ctx.shape, ctx.dtype = sharing, x.shape, x.dtype
        values_TK = values_SK
        if sharing.gathers:
            values_TK, gathering = _gather(values_SK, sharing.group)
            gathering.wait()
        y_TN = product(
            Scaled(values_TK, x_scale),
            Scaled(quantize(weight_NK, weight_scale, FORWARD), weight_scale),
            x.dtype,
            fast=True,
        )
        return y_TN.view(-1, *x.shape[1:-1], len(weight_NK))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        sharing: Sharing = ctx.sharing
        values_SK, x_scale, weight_NK, weight_scale = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dy_TN = gradients[0].reshape(-1, len(weight_NK))
        magnitudes = _amax((dy_TN,), sharing.group if sharing.splits_outputs else None)
        dy_scale = scale_of(magnitudes[0], sharing.gradient_type)

        values_TK, gathering = values_SK, None
        if sharing.gathers and needs_weight:
            values_TK, gathering = _gather(values_SK, sharing.group)
        dy_values_TN, dy_values_NT = quantize_both(dy_TN, dy_scale, sharing.gradient_type)

        dx_SK, reducing = None, None
        if needs_x:
            weight_values_KN = quantize_transposed(weight_NK, weight_scale, FORWARD)
            dx_TK = product(Scaled(dy_values_TN, dy_scale), Scaled(weight_values_KN, weight_scale), ctx.dtype)
            dx_SK, reducing = _reduce(dx_TK, sharing)

        weight_gradient = None
        if needs_weight:
            if gathering is not None:
                gathering.wait()
            weight_gradient = _weight_gradient(
                Scaled(dy_values_NT, dy_scale), Scaled(transposed(values_TK), x_scale), weight_NK, sharing
            )
        if reducing is not None:
            reducing.wait()
        return None if dx_SK is None else dx_SK.view(ctx.shape), weight_gradient, None


def _amax(tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> Tensor:
    """Largest magnitude of each tensor over the ranks of the group that hold parts of it, float32 [len(tensors)]."""
    largest = torch.stack([amax(tensor) for tensor in tensors])
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def _gather(values_SK: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """All ranks' rows, there when the work has been waited for; a byte a number, half of what bf16 would take."""
    values_TK = values_SK.new_empty(group.size() * len(values_SK), values_SK.shape[1])
    work = dist.all_gather_into_tensor(
        values_TK.view(torch.uint8), values_SK.view(torch.uint8), group=group, async_op=True
    )
    return values_TK, work


def _reduce(dx_TK: Tensor, sharing: Sharing) -> tuple[Tensor, dist.Work | None]:
    """The sum over the tensor group where its ranks have terms of it: this rank's rows, or all."""
    if sharing.gathers:
        dx_SK = dx_TK.new_empty(len(dx_TK) // sharing.group.size(), dx_TK.shape[1])
        return dx_SK, dist.reduce_scatter_tensor(dx_SK, dx_TK, group=sharing.group, async_op=True)
    if sharing.reduces:
        return dx_TK, dist.all_reduce(dx_TK, group=sharing.group, async_op=True)
    return dx_TK, None


def _weight_gradient(dy: Scaled, x: Scaled, weight: Any, sharing: Sharing) -> Tensor:
    """dW [N, K] from dy^T [N, T] and x^T [K, T]; added in float32 to Megatron's `main_grad` where the run fuses the two. Then
    the hook of its buckets only has to know that this gradient has come: of the tensor given back it takes nothing."""
    if not (sharing.fused and hasattr(weight, "main_grad")):
        return product(dy, x, weight.dtype)
    weight.main_grad.add_(product(dy, x, torch.float32))
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Outputs are split over the tensor group; the configuration is a `LinearConfig`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None, **given: Any) -> Tensor:
        sharing = Sharing(
            self.tp_group,
            GRADIENTS[self.config.scaled_mm],
            gathers=given["sequence_parallel"],
            reduces=given["allreduce_dgrad"],
            splits_outputs=True,
            fused=given["gradient_accumulation_fusion"],
        )
        output: Tensor = _Fp8Linear.apply(input, weight, sharing)
        return output if bias is None else output + bias


class Fp8RowParallelLinear(RowParallelLinear):
    """Inputs are split over the tensor group; the configuration is a `LinearConfig`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **given: Any) -> Tensor:
        sharing = Sharing(
            self.tp_group,
            GRADIENTS[self.config.scaled_mm],
            gathers=False,
            reduces=False,
            splits_outputs=False,
            fused=given["gradient_accumulation_fusion"],
        )
        output: Tensor = _Fp8Linear.apply(input, weight, sharing)
        return output
