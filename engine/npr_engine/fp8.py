"""Weights in FP8 (e4m3): half the bytes that a decode step reads.

    weight [D, C] ─► a scale for each output channel ─► e4m3          x [T, C] ─► a scale for each token ─► e4m3
                                            └──────── torch._scaled_mm ────────┘ ─► [T, D]

Per-channel weight scales and per-token activation scales, amax / 448 (Micikevicius et al. 2022; as vLLM and TensorRT-LLM do).
On a CPU the same numbers are multiplied in float32: what it yields is what a GPU yields, up to the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
ALIGNMENT = 16  # of both dimensions of a weight, by torch._scaled_mm


@dataclass(frozen=True)
class Fp8Weight:
    """e4m3 [D, C] and float32 [D]: weight = values * scales[:, None]."""

    values_DC: Tensor
    scales_D: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values_DC.shape

    @classmethod
    def of(cls, weight_DC: Tensor) -> Fp8Weight:
        values_DC, scales_D = quantise(weight_DC)
        return cls(values_DC, scales_D)

    def load(self, weight_DC: Tensor) -> None:
        """New values, in place: captured graphs go on reading them."""
        values_DC, scales_D = quantise(weight_DC)
        self.values_DC.copy_(values_DC)
        self.scales_D.copy_(scales_D)


def quantise(rows_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [R, C], float32 scales [R]); a row of zeros has scale 1."""
    if rows_RC.is_cuda:
        from npr_ext import triton_kernels  # there wherever torch was built for CUDA, and only there

        values_RC, scales_R = triton_kernels.quantise(rows_RC, FP8, LARGEST)
        return values_RC, scales_R
    wide_RC = rows_RC.float()
    scales_R = wide_RC.abs().amax(1) / LARGEST
    scales_R = torch.where(scales_R == 0, 1.0, scales_R)
    return (wide_RC / scales_R[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scales_R


def fp8_linear(x_TC: Tensor, weight: Fp8Weight, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's type, [T, D]."""
    x_values_TC, x_scales_T = quantise(x_TC)
    if x_TC.is_cuda and len(x_TC):
        product_TD = torch._scaled_mm(
            x_values_TC,
            weight.values_DC.t(),
            scale_a=x_scales_T[:, None],
            scale_b=weight.scales_D[None, :],
            out_dtype=torch.bfloat16,
        ).to(x_TC.dtype)
    else:
        exact_TD = x_values_TC.float() @ weight.values_DC.float().t()
        product_TD = (exact_TD * x_scales_T[:, None] * weight.scales_D).to(x_TC.dtype)
    return product_TD if bias_D is None else product_TD + bias_D
