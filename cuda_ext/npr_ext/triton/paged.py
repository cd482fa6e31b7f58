"""The engine's operators on a GPU, in Triton: what npr_ext.ops.paged and npr_ext.ops.decoder call for CUDA tensors.

    paged attention   a program for each (run of tokens of one row, key head, share of the keys); shares are merged by
                      log-sum-exp ("flash decoding", Dao et al. 2023), so that few long rows fill the device as well
    split_heads, rms_norm, silu_mul, quantise   a program for each token (and head); one launch each, float32 inside

Nothing reads device memory on the host, shapes of launches depend on shapes of tensors alone: a CUDA graph can hold them all.
Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, which is how they are tested where there is no GPU.

T tokens, N query heads, G key/value heads, H head dim, S slots, R runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npr_ext.ops.paged import RUN_TOKENS

MAX_SPLITS = 32
PROGRAMS_WANTED = 512  # a few for each multiprocessor of a large device


@triton.jit
def _attend_run(
    q_TNH,
    k_SGH,
    v_SGH,
    tables,
    rows,
    lengths,
    runs,
    out_TNH,
    part_out,
    part_max,
    part_sum,
    table_width,
    scale,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    splits: tl.constexpr,
    alone: tl.constexpr,
):
    run, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if alone:
        first, count = run, 1
    else:
        first, count = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)
    row_of_tile = tl.arange(0, block_rows)
    in_run = row_of_tile // group < count
    token = (first + row_of_tile // group).to(tl.int64)
    head = kv_head * group + row_of_tile % group
    length = tl.load(lengths + token, mask=in_run, other=0)
    longest = tl.max(length, 0)
    table = tables + tl.load(rows + first).to(tl.int64) * table_width

    d = tl.arange(0, block_dim)
    row_offset = (token * (group * num_kv_heads) + head) * dim
    at = row_offset[:, None] + d[None, :]
    inside = in_run[:, None] & (d < dim)[None, :]
    q = tl.load(q_TNH + at, mask=inside, other=0.0)

    share = tl.cdiv(tl.cdiv(longest, block_keys), splits) * block_keys
    begin = split * share
    end = tl.minimum(longest, begin + share)
    largest = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    mixed = tl.zeros([block_rows, block_dim], tl.float32)
    for start in range(begin, end, block_keys):
        key = start + tl.arange(0, block_keys)
        here = key < end
        slot = tl.load(table + key, mask=here, other=0).to(tl.int64)
        key_at = ((slot * num_kv_heads + kv_head) * dim)[:, None] + d[None, :]
        key_inside = here[:, None] & (d < dim)[None, :]
        k = tl.load(k_SGH + key_at, mask=key_inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(here[None, :] & (key[None, :] < length[:, None]), scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(largest - finite)
        v = tl.load(v_SGH + key_at, mask=key_inside, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        largest = now

    if splits == 1:
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_TNH + at, mixed.to(out_TNH.dtype.element_ty), mask=inside)
    else:
        part = (token * (group * num_kv_heads) + head) * splits + split
        tl.store(part_out + (part * dim)[:, None] + d[None, :], mixed, mask=inside)
        tl.store(part_max + part, largest, mask=in_run)
        tl.store(part_sum + part, total, mask=in_run)


@triton.jit
def _merge_splits(
    part_out,
    part_max,
    part_sum,
    out_TNH,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    splits: tl.constexpr,
    block_splits: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, block_splits)
    there = split < splits
    d = tl.arange(0, block_dim)
    largest = tl.load(part_max + row * splits + split, mask=there, other=float("-inf"))
    total = tl.load(part_sum + row * splits + split, mask=there, other=0.0)
    highest = tl.max(largest, 0)
    factor = tl.exp(largest - tl.where(highest == float("-inf"), 0.0, highest))
    parts = tl.load(
        part_out + ((row * splits + split) * dim)[:, None] + d[None, :],
        mask=there[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    sum_of_all = tl.sum(total * factor, 0)
    mixed = tl.sum(parts * factor[:, None], 0) / tl.where(sum_of_all == 0.0, 1.0, sum_of_all)
    tl.store(out_TNH + row * dim + d, mixed.to(out_TNH.dtype.element_ty), mask=d < dim)


def stages_of(itemsize: int) -> int:
    """Of the loop over keys. A stage is 64 keys and values in shared memory: 32 KiB of 16-bit numbers at 128 dimensions."""
    return 3 if itemsize == 2 else 1


def paged_attention(
    q_TNH: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
    tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scale: float,
    runs: Tensor | None,
) -> Tensor:
    """[T, N, H]; see ops/paged.py. `runs` int32 [R, 2]: (first token, number of tokens <= 16) of neighbours in one table row;
    None: every token is its own."""
    num_tokens, num_heads, dim = q_TNH.shape
    num_kv_heads = k_SGH.shape[1]
    group = num_heads // num_kv_heads
    num_runs, tokens_of_run = (num_tokens, 1) if runs is None else (len(runs), RUN_TOKENS)
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out_TNH
    splits = max(1, min(MAX_SPLITS, PROGRAMS_WANTED // (num_runs * num_kv_heads)))
    parts = (num_tokens, num_heads, splits if splits > 1 else 0)
    part_out = torch.empty(*parts, dim, dtype=torch.float32, device=q_TNH.device)
    part_max, part_sum = (torch.empty(parts, dtype=torch.float32, device=q_TNH.device) for _ in range(2))
    block_dim = max(16, triton.next_power_of_2(dim))
    _attend_run[(num_runs, num_kv_heads, splits)](
        q_TNH.contiguous(),
        k_SGH,
        v_SGH,
        tables,
        rows,
        lengths,
        lengths if runs is None else runs,
        out_TNH,
        part_out,
        part_max,
        part_sum,
        tables.shape[1],
        scale,
        dim=dim,
        block_dim=block_dim,
        group=group,
        num_kv_heads=num_kv_heads,
        block_rows=max(16, triton.next_power_of_2(tokens_of_run * group)),
        block_keys=64,
        splits=splits,
        alone=runs is None,
        num_stages=stages_of(q_TNH.itemsize),
    )
    if splits > 1:
        _merge_splits[(num_tokens * num_heads,)](
            part_out,
            part_max,
            part_sum,
            out_TNH,
            dim=dim,
            block_dim=block_dim,
            splits=splits,
            block_splits=triton.next_power_of_2(splits),
        )
    return out_TNH


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
    """Queries [T, N, H]; see npr_ext.ops.decoder. A token of slot -1 (padding of a CUDA graph) leaves no key and no value."""
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
            num_warps=_warps(width),
        )
    return sum_TD, out_TD


def _warps(width: int) -> int:
    """Of a program that goes through a row at once: 512 numbers a warp, 4 to 16 of them."""
    return max(4, min(16, triton.next_power_of_2(width) // 512))


@triton.jit
def _quantise(x_RC, values_RC, scales_R, largest, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    there = i < width
    x = tl.load(x_RC + row * width + i, mask=there, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / largest
    scale = tl.where(scale == 0.0, 1.0, scale)
    scaled = tl.minimum(tl.maximum(x / scale, -largest), largest)
    tl.store(values_RC + row * width + i, scaled.to(values_RC.dtype.element_ty), mask=there)
    tl.store(scales_R + row, scale)


def quantise(x_RC: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """(values in an FP8 type [R, C], float32 scales [R]): x = values * scales, the greatest of a row is `largest`."""
    x_RC = x_RC.contiguous()
    num_rows, width = x_RC.shape
    values_RC = torch.empty_like(x_RC, dtype=dtype)
    scales_R = torch.empty(num_rows, dtype=torch.float32, device=x_RC.device)
    if num_rows:
        _quantise[(num_rows,)](
            x_RC,
            values_RC,
            scales_R,
            largest,
            width=width,
            block=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )
    return values_RC, scales_R


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
