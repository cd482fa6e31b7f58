"""A decoder layer's element-wise operators on a GPU, in Triton: what npr_ext.ops.decoder calls for CUDA tensors.

A program for each token (and head), one launch each, float32 inside. As in npr_ext.triton.paged a CUDA graph
can hold them, and Triton's interpreter runs them on a CPU.

T tokens, D hidden, F feed-forward, N query heads, G key/value heads, H head dim, P positions, S KV slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npr_ext.triton.warps import warps_of_row


@triton.jit
def _split_heads(
    qkv_TC,
    query_norm,
    key_norm,
    cos_Ph,
    sin_Ph,
    positions,
    slots,
    queries_TNH,
    k_SGH,
    v_SGH,
    eps,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    block_half: tl.constexpr,
    has_norm: tl.constexpr,
):
    token, fused_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_head, part = fused_head // (group + 2), fused_head % (group + 2)
    dim: tl.constexpr = 2 * half
    i = tl.arange(0, block_half)
    there = i < half
    source = qkv_TC + (token * num_kv_heads * (group + 2) + fused_head) * dim
    low = tl.load(source + i, mask=there, other=0.0).to(tl.float32)
    high = tl.load(source + half + i, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    if part < group + 1:
        if has_norm:
            weight = query_norm if part < group else key_norm
            factor = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / dim + eps)
            low = low * factor * tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
            high = high * factor * tl.load(weight + half + i, mask=there, other=0.0).to(tl.float32)
        position = tl.load(positions + token).to(tl.int64)
        cos = tl.load(cos_Ph + position * half + i, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_Ph + position * half + i, mask=there, other=0.0).to(tl.float32)
        low, high = low * cos - high * sin, high * cos + low * sin
    if part < group:
        to = queries_TNH + (token * num_kv_heads * group + kv_head * group + part) * dim
        tl.store(to + i, low.to(queries_TNH.dtype.element_ty), mask=there)
        tl.store(to + half + i, high.to(queries_TNH.dtype.element_ty), mask=there)
    else:
        cache = k_SGH if part == group else v_SGH
        to = cache + (slot * num_kv_heads + kv_head) * dim
        kept = i < tl.where(slot >= 0, half, 0)
        tl.store(to + i, low.to(k_SGH.dtype.element_ty), mask=kept)
        tl.store(to + half + i, high.to(k_SGH.dtype.element_ty), mask=kept)


def split_heads(
    qkv_TC: Tensor,
    query_norm_H: Tensor | None,
    key_norm_H: Tensor | None,
    cos_Ph: Tensor,
    sin_Ph: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
    eps: float,
) -> Tensor:
    """Queries [T, N, H]; see npr_ext.ops.decoder. A token of slot -1 (padding of a CUDA graph) leaves no key
    and no value."""
    num_tokens = len(qkv_TC)
    _, num_kv_heads, dim = k_SGH.shape
    group = qkv_TC.shape[1] // (num_kv_heads * dim) - 2
    queries_TNH = qkv_TC.new_empty(num_tokens, num_kv_heads * group, dim)
    if num_tokens:
        _split_heads[(num_tokens, num_kv_heads * (group + 2))](
            qkv_TC.contiguous(),
            query_norm_H,
            key_norm_H,
            cos_Ph,
            sin_Ph,
            positions,
            slots,
            queries_TNH,
            k_SGH,
            v_SGH,
            eps,
            group=group,
            num_kv_heads=num_kv_heads,
            half=dim // 2,
            block_half=triton.next_power_of_2(dim // 2),
            has_norm=query_norm_H is not None,
            num_warps=1,  # a head is 2 to 4 numbers a lane
        )
    return queries_TNH


@triton.jit
def _rms_norm(
    x_TD, more_TD, weight_D, sum_TD, out_TD, eps, width: tl.constexpr, block: tl.constexpr, adds: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    there = i < width
    x = tl.load(x_TD + token * width + i, mask=there, other=0.0).to(tl.float32)
    if adds:
        x += tl.load(more_TD + token * width + i, mask=there, other=0.0).to(tl.float32)
        rounded = x.to(sum_TD.dtype.element_ty)
        tl.store(sum_TD + token * width + i, rounded, mask=there)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_D + i, mask=there, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * weight
    tl.store(out_TD + token * width + i, normed.to(out_TD.dtype.element_ty), mask=there)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """[T, D]; see npr_ext.ops.decoder."""
    return _normed(x_TD, None, weight_D, eps)[1]


def add_rms_norm(x_TD: Tensor, more_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + more, its norm), [T, D] both; see npr_ext.ops.decoder."""
    return _normed(x_TD, more_TD, weight_D, eps)


def _normed(x_TD: Tensor, more_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x or x + more, its norm)."""
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    sum_TD = x_TD if more_TD is None else torch.empty_like(x_TD)
    width = x_TD.shape[1]
    if len(x_TD):
        _rms_norm[(len(x_TD),)](
            x_TD,
            x_TD if more_TD is None else more_TD.contiguous(),
            weight_D,
            sum_TD,
            out_TD,
            eps,
            width=width,
            block=triton.next_power_of_2(width),
            adds=more_TD is not None,
            num_warps=warps_of_row(width),
        )
    return sum_TD, out_TD


@triton.jit
def _silu_mul(gate_up, out_TF, width, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    there = i < width
    gate = tl.load(gate_up + token * 2 * width + i, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + i, mask=there, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_TF + token * width + i, product.to(out_TF.dtype.element_ty), mask=there)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """[T, F]; see npr_ext.ops.decoder."""
    gate_up_TF = gate_up_TF.contiguous()
    width = gate_up_TF.shape[1] // 2
    out_TF = gate_up_TF.new_empty(len(gate_up_TF), width)
    if len(gate_up_TF):
        _silu_mul[(len(gate_up_TF), triton.cdiv(width, 1024))](gate_up_TF, out_TF, width, block=1024)
    return out_TF
