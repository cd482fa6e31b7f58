"""Paged attention on a GPU, in Triton: what npr_ext.ops.paged calls for CUDA tensors.

A program for each (run of tokens of one batch row, key head, share of the keys); shares are merged by log-sum-exp
("flash decoding", Dao et al. 2023), so that few long rows fill the device as well. Computed in float32.

Nothing reads device memory on the host, shapes of launches depend on shapes of tensors alone: a CUDA graph
can hold them all. Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, which is how they are tested
where there is no GPU.

T tokens, N query heads, G key/value heads, H head dim, S KV slots, R runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npr_ext.sizes import RUN_TOKENS

MAX_SPLITS = 32
PROGRAMS_WANTED = 512  # a few for each multiprocessor of a large device


@triton.jit
def _attend_run(
    q_TNH,
    k_SGH,
    v_SGH,
    block_tables,
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
    block_table = block_tables + tl.load(rows + first).to(tl.int64) * table_width

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
        slot = tl.load(block_table + key, mask=here, other=0).to(tl.int64)
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
    """Pipeline stages of the loop over keys: each holds 64 keys and values in shared memory, 32 KiB of 16-bit
    numbers at 128 dimensions."""
    return 3 if itemsize == 2 else 1


def paged_attention(
    q_TNH: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scale: float,
    runs: Tensor | None,
) -> Tensor:
    """Attention of each token to the KV slots of its batch row, [T, N, H]; arguments as npr_ext.ops.paged defines them.

    `runs` int32 [R, 2]: (first token, number of tokens <= 16) of neighbours in one batch row; None: every
    token is its own.
    """
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
        block_tables,
        rows,
        lengths,
        lengths if runs is None else runs,
        out_TNH,
        part_out,
        part_max,
        part_sum,
        block_tables.shape[1],
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
