"""Products of matrices, of which either may be rounded to FP8.

In TE's layouts, with A the first operand (mostly the weight): TN is B A^T (forward), NN is B A (gradient of the input), NT is
B^T A (gradient of the weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.fakes.te_on_cpu.dtypes import torch_dtype
from tests.fakes.te_on_cpu.quantise import BLOCK


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: object,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: object = None,
    comm_type: object = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
    """The product, with the bias (forward) or beside the bias' gradient (`grad`), into or added to `out` where there is one."""
    assert quantizer is None and not gelu and comm_overlap is None and alpha == 1.0, (
        "not written: nobody asked"
    )
    a_rows, b_rows = _operand(a, rowwise=transpose_a), _operand(b, rowwise=not transpose_b)
    _check_fp8(a, b)
    y = {(True, False): _forward, (False, False): _input_gradient, (False, True): _weight_gradient}[
        (transpose_a, transpose_b)
    ](*_same_dtype(a_rows, b_rows))
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b_rows.sum(0).to(torch_dtype(bias_dtype))
    elif bias is not None:
        y = y + bias
    if not transpose_b:
        y = y.reshape(*b.size()[:-1], y.shape[-1])
    if out is None:
        return y.to(torch_dtype(out_dtype) if out_dtype is not None else a.dtype), bias_gradient, None, None
    (out.add_ if accumulate else out.copy_)(y.reshape(out.shape))
    return out, bias_gradient, None, None


def te_general_grouped_gemm(
    a: Sequence[Any],
    transpose_a: bool,
    b: Sequence[Any],
    transpose_b: bool,
    out: Sequence[Tensor],
    out_dtype: int,
    num_rows: Sequence[int],
    bias: Sequence[Tensor],
    bias_dtype: int,
    single_output: bool,
    pre_gelu: Sequence[Tensor],
    grad: bool,
    workspaces: object,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    num_multiprocessors: int,
) -> Sequence[Tensor]:
    """A product for each group of rows (the tokens of an expert), into parts of one output or into one each; the biases."""
    assert all(each.numel() == 0 for each in bias), "not written: nobody asked"
    outputs = torch.split(out[0], list(num_rows)) if single_output else out
    for one_a, one_b, one_out in zip(a, b, outputs, strict=True):
        if 0 in (*one_a.size(), *one_b.size()):
            if not accumulate:
                one_out.zero_()
            continue
        generic_gemm(
            one_a, transpose_a, one_b, transpose_b, one_out, None, out_dtype, None, bias_dtype, False, None, grad,
            None, 0, accumulate, use_split_accumulator,
        )  # fmt: skip
    return bias


def _forward(a_NK: Tensor, b_MK: Tensor) -> Tensor:
    return b_MK @ a_NK.t()


def _input_gradient(a_NK: Tensor, b_MN: Tensor) -> Tensor:
    return b_MN @ a_NK


def _weight_gradient(a_MK: Tensor, b_MN: Tensor) -> Tensor:
    return b_MN.t() @ a_MK


def _same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a, b) if a.dtype == b.dtype else (a.float(), b.float())


def _operand(tensor: Any, *, rowwise: bool) -> Tensor:
    """[rows, columns] as they stand rowwise or columnwise (and are transposed back here, which Hopper's FP8 cannot)."""
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if isinstance(tensor, Float8TensorStorage):
        data = tensor._data if rowwise else tensor._transpose
        assert rowwise or not tensor._transpose_invalid, (
            "the FP8 product needs a transposed copy that is out of date"
        )
    elif isinstance(tensor, Float8BlockwiseQTensorStorage):
        data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    else:
        plain: Tensor = tensor.reshape(-1, tensor.shape[-1])
        return plain
    assert data is not None, f"the FP8 product needs its operand {'rowwise' if rowwise else 'columnwise'}"
    numbers = data.view(torch_dtype(tensor._fp8_dtype)).float()
    numbers = numbers.reshape(-1, numbers.shape[-1]) if rowwise else numbers.reshape(numbers.shape[0], -1)
    assert numbers.shape[1] % 16 == 0, f"cuBLAS multiplies FP8 along multiples of 16, not {numbers.shape[1]}"
    if isinstance(tensor, Float8TensorStorage):
        numbers = numbers * tensor._scale_inv
    else:
        inverse = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
        numbers = numbers * _spread(inverse, numbers.shape, square=tensor._is_2D_scaled)
    return numbers if rowwise else numbers.t()


def _spread(inverse: Tensor, shape: torch.Size, *, square: bool) -> Tensor:
    """Inverse scales of blocks as one for each number; those of 1 x 128 lie transposed."""
    rows, columns = shape
    blocks = inverse[: -(-rows // BLOCK)].repeat_interleave(BLOCK, 0)[:rows] if square else inverse.t()[:rows]
    return blocks.repeat_interleave(BLOCK, 1)[:, :columns]


def _check_fp8(a: Any, b: Any) -> None:
    """What cuBLAS cannot: E5M2 by E5M2, and 128 x 128 by 128 x 128."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    rounded = [each for each in (a, b) if isinstance(each, QuantizedTensorStorage)]
    assert len(rounded) in (0, 2), "both operands of an FP8 product are FP8"
    if rounded:
        assert any(torch_dtype(each._fp8_dtype) == torch.float8_e4m3fn for each in rounded), "E5M2 by E5M2"
    by_blocks = [each for each in rounded if isinstance(each, Float8BlockwiseQTensorStorage)]
    assert not by_blocks or not all(each._is_2D_scaled for each in by_blocks), "128 x 128 by 128 x 128"
