"""Rounding to FP8: TE's quantisers and the tensors that they fill.

A quantised tensor [..., K] of M = prod(...) rows has its numbers rowwise, as they lie, and columnwise, [K, ...], as bytes. One
scale for all (delayed and current scaling), or, blockwise, one for 128 numbers along the dimension that a product sums over
(activations) or for 128 x 128 (weights).

Shape legend: M rows, K columns, m = ceil(M / 128), k = ceil(K / 128).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.fakes.te_on_cpu.dtypes import torch_dtype
from tests.fakes.te_on_cpu.scales import scale_of

BLOCK = 128

CALLS: Counter[str] = Counter()
"""How many tensors were rounded, by the class of the quantiser."""


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` as a quantised one, or into `output`, which then has what the quantiser asks for and nothing else."""
    # TE's Python imports this module: its classes exist when a function is called, not before.
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    if noop is not None and noop.numel() and noop.item():
        return output
    CALLS[type(quantizer).__name__] += 1
    with torch.no_grad():
        if isinstance(quantizer, Float8BlockQuantizer):
            return _by_blocks(tensor.detach(), quantizer, output)
        assert isinstance(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer)), type(quantizer)
        amax = tensor.detach().float().abs().amax() if tensor.numel() else torch.zeros(())
        if isinstance(quantizer, Float8Quantizer):
            if quantizer.amax.numel():  # weights held in FP8 come with a scale alone
                quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
            return _by_one_scale(tensor.detach(), quantizer.scale.reshape(1), quantizer, output)
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = scale_of(
            amax, quantizer.dtype, epsilon=quantizer.amax_epsilon, power_of_2=quantizer.force_pow_2_scales
        )
        return _by_one_scale(tensor.detach(), scale.reshape(1), quantizer, output)


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """A tensor that the quantiser would make, whose numbers mean nothing."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    nothing = torch.zeros(shape, dtype=dtype)
    if isinstance(quantizer, Float8BlockQuantizer):
        return _by_blocks(nothing, quantizer, None)
    return _by_one_scale(nothing, torch.ones(1), quantizer, None)


def split_quantize(
    tensor: Tensor,
    sections: Sequence[int],
    quantizers: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Rows of `tensor` in sections, each by its quantiser."""
    parts = torch.split(tensor, list(sections))
    return [quantize(part, quantizer) for part, quantizer in zip(parts, quantizers, strict=True)]


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Gradient of the bias [K], and `gradient` rounded."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


def dequantize(tensor: Any, dtype: int) -> Tensor:
    """A tensor of one scale as ordinary numbers."""
    numbers = tensor._data.view(torch_dtype(tensor._fp8_dtype)).float() * tensor._scale_inv
    return numbers.to(torch_dtype(dtype))


def fp8_transpose(data: Tensor, dtype: int, out: Tensor | None = None) -> Tensor:
    """Bytes [..., K] columnwise, [K, ...]."""
    return _into(out, _columnwise(data))


def fp8_block_scaling_compute_partial_amax(
    part: Tensor, amax: Tensor, num_rows: int, num_columns: int, start: int, block: int
) -> None:
    """Largest absolute values of the blocks of a weight [M, K], of which this rank has the flat `part` from `start` on."""
    whole = part.new_zeros(num_rows * num_columns)
    whole[start : start + part.numel()] = part.reshape(-1)
    m, k = -(-num_rows // block), -(-num_columns // block)
    padded = functional.pad(
        whole.view(num_rows, num_columns), (0, k * block - num_columns, 0, m * block - num_rows)
    )
    amax[:m, :k] = padded.view(m, block, k, block).abs().amax((1, 3))


def fp8_block_scaling_partial_cast(
    part: Tensor,
    out: Tensor,
    scale: Tensor,
    num_rows: int,
    num_columns: int,
    start: int,
    block: int,
    dtype: int,
) -> None:
    """That part as bytes, each number by the scale of its block."""
    of_each = scale.repeat_interleave(block, 0)[:num_rows].repeat_interleave(block, 1)[:, :num_columns]
    out.copy_(_rounded(part.reshape(-1), of_each.reshape(-1)[start : start + part.numel()], dtype))


def _by_one_scale(tensor: Tensor, scale_1: Tensor, quantizer: Any, output: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = _rounded(tensor, scale_1, quantizer.dtype)
    rowwise = data if quantizer.rowwise_usage else None
    columnwise = _columnwise(data) if quantizer.columnwise_usage else None
    if output is not None:
        output._data = _into(output._data, rowwise)
        output._transpose = _into(output._transpose, columnwise)
        output._transpose_invalid = columnwise is None
        output._scale_inv.copy_((1 / scale_1).reshape(output._scale_inv.shape))
        return output
    parts = {
        "data": rowwise,
        "data_transpose": columnwise,
        "fp8_scale_inv": 1 / scale_1,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=tensor.dtype, **parts)
    return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, **parts)


def _by_blocks(tensor: Tensor, quantizer: Any, output: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    square = quantizer.block_scaling_dim == 2
    shape = tensor.shape
    x_MK = tensor.reshape(-1, shape[-1])
    rowwise: tuple[Tensor | None, Tensor | None] = (None, None)
    columnwise: tuple[Tensor | None, Tensor | None] = (None, None)
    if quantizer.rowwise_usage:
        data, inverse = _rounded_by_blocks(x_MK, quantizer, BLOCK if square else 1)
        rowwise = data.reshape(shape), _for_gemm(inverse if square else inverse.t())
    if quantizer.columnwise_usage:
        data, inverse = _rounded_by_blocks(x_MK.t(), quantizer, BLOCK if square else 1)
        columnwise = data.reshape(shape[-1], *shape[:-1]), _for_gemm(inverse if square else inverse.t())
    if output is not None:
        output._rowwise_data = _into(output._rowwise_data, rowwise[0])
        output._rowwise_scale_inv = _into(output._rowwise_scale_inv, rowwise[1])
        output._columnwise_data = _into(output._columnwise_data, columnwise[0])
        output._columnwise_scale_inv = _into(output._columnwise_scale_inv, columnwise[1])
        return output
    parts = {
        "rowwise_data": rowwise[0],
        "rowwise_scale_inv": rowwise[1],
        "columnwise_data": columnwise[0],
        "columnwise_scale_inv": columnwise[1],
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": square,
    }
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(fake_dtype=tensor.dtype, **parts)
    return Float8BlockwiseQTensor(shape=shape, dtype=tensor.dtype, device=tensor.device, **parts)


def _rounded(tensor: Tensor, scale: Tensor, dtype: int) -> Tensor:
    """Bytes; what is too large becomes the largest number, as in the kernels."""
    fp8 = torch_dtype(dtype)
    largest = torch.finfo(fp8).max
    return (tensor.float() * scale).clamp(-largest, largest).to(fp8).view(torch.uint8)


def _rounded_by_blocks(x_MK: Tensor, quantizer: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Bytes [M, K] and inverse scales [ceil(M / rows), k] of blocks of `rows` x 128."""
    num_rows, num_columns = x_MK.shape
    m, k = -(-num_rows // rows), -(-num_columns // BLOCK)
    padded = functional.pad(x_MK.float(), (0, k * BLOCK - num_columns, 0, m * rows - num_rows))
    blocks = padded.reshape(m, rows, k, BLOCK)
    scale_mk = scale_of(
        blocks.abs().amax((1, 3)),
        quantizer.dtype,
        epsilon=quantizer.amax_epsilon,
        power_of_2=quantizer.force_pow_2_scales,
    )
    data = _rounded(blocks, scale_mk[:, None, :, None], quantizer.dtype).reshape(padded.shape)
    return data[:num_rows, :num_columns].contiguous(), 1 / scale_mk


def _columnwise(data: Tensor) -> Tensor:
    return data.reshape(-1, data.shape[-1]).t().contiguous().reshape(data.shape[-1], *data.shape[:-1])


def _for_gemm(inverse: Tensor) -> Tensor:
    """Inverse scales as the product reads them: rows of a multiple of four."""
    return functional.pad(inverse, (0, -inverse.shape[-1] % 4)).contiguous()


def _into(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new` in the storage of `old` where both are there."""
    return new if old is None or new is None else old.copy_(new)
