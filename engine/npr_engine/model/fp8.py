"""Weights in FP8 (e4m3): half the bytes that a decode step reads.

    weight [D, C] ─► a scale for each output channel ─► e4m3          x [T, C] ─► a scale for each token ─► e4m3
                                            └────── npr_ext.ops.scaled_mm.scaled_mm ─────┘ ─► [T, D]

Per-channel weight scales and per-token activation scales, amax / 448 (Micikevicius et al. 2022; as vLLM and
TensorRT-LLM do). On a CPU the same numbers are multiplied in float32: what it yields is what a GPU yields, up
to the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npr_ext.ops.fp8 import E4M3, quantize_rows
from npr_ext.ops.scaled_mm import scaled_mm

FP8 = E4M3


@dataclass(frozen=True)
class Fp8Weight:
    """e4m3 [D, C] and float32 [D]: weight = values * scales[:, None]."""

    values_DC: Tensor
    scales_D: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values_DC.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values_DC.dtype

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Fp8Weight:
        """Room for a weight, of zeros."""
        values_DC = torch.zeros(rows, columns, dtype=FP8, device=device)
        return cls(values_DC, torch.ones(rows, device=device))

    @classmethod
    def of(cls, weight_DC: Tensor) -> Fp8Weight:
        """A weight [D, C] of any type, rounded."""
        values_DC, scales_D = quantize_rows(weight_DC, FP8)
        return cls(values_DC, scales_D)

    def load(self, weight_DC: Tensor) -> None:
        """New values, in place: captured graphs go on reading them."""
        self.copy_(Fp8Weight.of(weight_DC))

    def copy_(self, other: Fp8Weight) -> None:
        """The other's values, in place; free of charge where they are these."""
        for own, new in ((self.values_DC, other.values_DC), (self.scales_D, other.scales_D)):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)


def fp8_linear(x_TC: Tensor, weight: Fp8Weight, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's type, [T, D]."""
    on_gpu = x_TC.is_cuda and len(x_TC) > 0
    if on_gpu:
        # Triton is there wherever torch was built for CUDA, and only there. This is `quantize_rows` in one launch; weights keep
        # to `quantize_rows` itself, so that those which were quantized on their way to the engine are its own to the bit.
        from npr_ext.triton import fp8 as kernels

        x_values_TC, x_scales_T = kernels.quantize_rows(x_TC, FP8, torch.finfo(FP8).max)
    else:
        x_values_TC, x_scales_T = quantize_rows(x_TC, FP8)
    product_TD = scaled_mm(
        x_values_TC,
        weight.values_DC.t(),
        x_scales_T[:, None],
        weight.scales_D[None, :],
        torch.bfloat16 if on_gpu else x_TC.dtype,
    ).to(x_TC.dtype)
    return product_TD if bias_D is None else product_TD + bias_D
