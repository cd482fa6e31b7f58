"""Weights in FP8 (e4m3): half the bytes that a decode step reads.

    weight [D, C] ─► a scale for each output channel ─► e4m3          x [T, C] ─► a scale for each token ─► e4m3
                                            └────── npr_ext.ops.scaled_mm.scaled_mm ─────┘ ─► [T, D]

Per-channel weight scales and per-token activation scales, amax / 448 (Micikevicius et al. 2022; as vLLM and TensorRT-LLM do).
On a CPU the same numbers are multiplied in float32: what it yields is what a GPU yields, up to the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npr_ext.ops.scaled_mm import scaled_mm

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
PROJECTIONS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
"""Ends of the names of the weights that an engine in FP8 holds so; norms, biases, routers and vocabularies stay."""


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
        values_DC, scales_D = quantise(weight_DC)
        return cls(values_DC, scales_D)

    def load(self, weight_DC: Tensor) -> None:
        """New values, in place: captured graphs go on reading them."""
        self.copy_(Fp8Weight.of(weight_DC))

    def copy_(self, other: Fp8Weight) -> None:
        """The other's values, in place; free of charge where they are these."""
        for own, new in ((self.values_DC, other.values_DC), (self.scales_D, other.scales_D)):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)


def is_projection(name: str) -> bool:
    """Whether an engine in FP8 holds the weight of that name so."""
    return name.endswith(PROJECTIONS)


def quantise(rows_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [R, C], float32 scales [R]); a row of zeros has scale 1."""
    scales_R = row_scales(row_maxima(rows_RC))
    return to_fp8(rows_RC, scales_R), scales_R


def row_maxima(rows_RC: Tensor) -> Tensor:
    """Largest magnitude of each row, float32 [R]; that of a row in pieces is the largest of theirs."""
    return rows_RC.abs().amax(1).float()


def row_scales(maxima_R: Tensor) -> Tensor:
    """The scale of each row by its largest magnitude."""
    scales_R = maxima_R / LARGEST
    return torch.where(scales_R == 0, 1.0, scales_R)


def to_fp8(rows_RC: Tensor, scales_R: Tensor) -> Tensor:
    """Rows, or any columns of them, as e4m3 under their scales."""
    return (rows_RC.float() / scales_R[:, None]).clamp(-LARGEST, LARGEST).to(FP8)


def fp8_linear(x_TC: Tensor, weight: Fp8Weight, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's type, [T, D]."""
    on_gpu = x_TC.is_cuda and len(x_TC) > 0
    if on_gpu:
        from npr_ext.triton import (
            paged as triton_kernels,  # there wherever torch was built for CUDA, and only there
        )

        # The definition in one launch. Weights keep to the definition itself, so that those which were quantised on their
        # way to the engine are its own to the bit.
        x_values_TC, x_scales_T = triton_kernels.quantise(x_TC, FP8, LARGEST)
    else:
        x_values_TC, x_scales_T = quantise(x_TC)
    product_TD = scaled_mm(
        x_values_TC,
        weight.values_DC.t(),
        x_scales_T[:, None],
        weight.scales_D[None, :],
        torch.bfloat16 if on_gpu else x_TC.dtype,
    ).to(x_TC.dtype)
    return product_TD if bias_D is None else product_TD + bias_D
