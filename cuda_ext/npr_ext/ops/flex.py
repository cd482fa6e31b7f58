"""Branch attention on a GPU: FlexAttention over the tiles that our block lists name, forward and backward.

    q, k, v [T, heads, H] ──► padded to a bucket length ──► compiled flex_attention(BlockMask) ──► [T, N, H]

FlexAttention is compiled for a shape; lengths are rounded up to few buckets, so a run compiles a handful of
kernels. The tokens that pad are sequences of their own: they cost the diagonal tile that they stand in.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

MAX_BUCKETS = 64  # of queries and keys together, in one process


@functools.cache
def compiled_attention() -> Callable[..., Tensor]:
    """flex_attention, compiled once for each bucket (and for each number of heads and type)."""
    limit = max(torch._dynamo.config.recompile_limit, MAX_BUCKETS)
    # Around each call, and one object for all of them: torch makes a context variable for each, which is never freed.
    raised = torch._dynamo.config.patch(recompile_limit=limit)
    attend: Callable[..., Tensor] = raised(torch.compile(flex_attention, dynamic=False))
    return attend


def flex_branch_attention(
    q_QNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    mask: BlockMask,
    scale: float,
    attend: Callable[..., Any] | None = None,
) -> Tensor:
    """[Q, N, H] by FlexAttention; `mask` is `BranchLayout.bucket_mask`. `attend`: flex_attention itself,
    compiled if None."""
    num_queries, num_keys = mask.seq_lengths
    output_1NQH: Tensor = (attend or compiled_attention())(
        _heads_first(q_QNH, num_queries),
        _heads_first(k_TKH, num_keys),
        _heads_first(v_TKH, num_keys),
        block_mask=mask,
        scale=scale,
        enable_gqa=q_QNH.shape[1] != k_TKH.shape[1],
    )
    return output_1NQH[0].transpose(0, 1)[: len(q_QNH)]


def _heads_first(tensor_TNH: Tensor, length: int) -> Tensor:
    """[1, N, length, H], zeros beyond the tokens."""
    missing = length - len(tensor_TNH)
    padded_TNH = functional.pad(tensor_TNH, (0, 0, 0, 0, 0, missing)) if missing else tensor_TNH
    return padded_TNH.transpose(0, 1)[None]
