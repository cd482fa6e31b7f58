"""The module `transformer_engine_torch`, NVIDIA's compiled half, as TE's Python imports it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from tests.fakes.te_on_cpu.dtypes import DType, FP8BwdTensors, FP8FwdTensors, NVTE_Fused_Attn_Backend
from tests.fakes.te_on_cpu.norms import rmsnorm_bwd, rmsnorm_fwd
from tests.fakes.te_on_cpu.optimizer import multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale
from tests.fakes.te_on_cpu.products import generic_gemm, te_general_grouped_gemm
from tests.fakes.te_on_cpu.quantise import (
    bgrad_quantize,
    create_empty_quantized_tensor,
    dequantize,
    fp8_block_scaling_compute_partial_amax,
    fp8_block_scaling_partial_cast,
    fp8_transpose,
    quantize,
    split_quantize,
)
from tests.fakes.te_on_cpu.rows import fused_multi_row_padding, fused_multi_row_unpadding, swap_first_dims
from tests.fakes.te_on_cpu.scales import (
    compute_amax,
    fused_amax_and_scale_update_after_reduction,
    multi_tensor_compute_scale_and_scale_inv,
)

__all__ = [
    "DType",
    "FP8BwdTensors",
    "FP8FwdTensors",
    "NVTE_Fused_Attn_Backend",
    "bgrad_quantize",
    "compute_amax",
    "create_empty_quantized_tensor",
    "dequantize",
    "fp8_block_scaling_compute_partial_amax",
    "fp8_block_scaling_partial_cast",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "fused_multi_row_padding",
    "fused_multi_row_unpadding",
    "generic_gemm",
    "layernorm_bwd",
    "layernorm_fwd",
    "multi_tensor_adam",
    "multi_tensor_compute_scale_and_scale_inv",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "quantize",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "split_quantize",
    "swap_first_dims",
    "te_general_grouped_gemm",
]


def get_cublasLt_version() -> int:
    return 13_00_00


def get_cudnn_version() -> int:
    return 9_14_00


def get_num_cublas_streams() -> int:
    return 4


def get_stream_priority_range(*_: object) -> tuple[int, int]:
    return 0, -1


class _Names(type):
    """An enumeration that TE's Python reads at import and that nothing here is called with."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return zlib.crc32(name.encode())  # any number, a different one for each


def __getattr__(name: str) -> Any:
    """What is not written here: an enumeration of names, or a function that says so."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (), {}) if name[0].isupper() else _missing(name)


def _missing(name: str) -> Callable[..., Any]:
    def missing(*args: object, **kwargs: object) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in on the CPU")

    return missing


# TE looks these two up by an import of everything, which asks for nothing by name.
layernorm_fwd, layernorm_bwd = _missing("layernorm_fwd"), _missing("layernorm_bwd")
