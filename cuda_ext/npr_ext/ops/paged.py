"""Attention of new tokens to a paged cache of keys and values: the engine's operator."""

import torch
from torch import Tensor

from npr_ext import library  # noqa: F401  (registers torch.ops.npr)


def paged_attention(
    q_TNH: Tensor,
    k_cache_SKH: Tensor,
    v_cache_SKH: Tensor,
    block_tables: Tensor,
    row_of_token: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    runs: Tensor | None = None,
) -> Tensor:
    """Token t attends to the slots ``block_tables[row_of_token[t], :lengths[t]]``; a token without keys gives
    zeros. [T, N, H].

    Args:
        q_TNH: queries of this step's tokens, float32, float64 or bfloat16 (then accumulated in float32).
        k_cache_SKH: keys by slot, contiguous; N is a multiple of K.
        v_cache_SKH: values by slot, contiguous.
        block_tables: int32 [rows, width], KV slots of each batch row in order; a fork aliases slots, a join concatenates them.
        row_of_token: int32 [T]. Neighbouring tokens of one row (a prefill chunk) are computed together.
        lengths: int32 [T] keys of each token.
        scale: factor of the scores; 1 / sqrt(H) if None.
        runs: int32 [R, 2], (first token, tokens <= 16) of neighbours in one row, which a GPU computes together; the CPU finds
            them itself. Each token alone if None.

    Raises:
        ValueError: a shape, type, row, length or slot that does not fit (on the CPU; a GPU's memory is not read to check).
    """
    factor = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    if q_TNH.is_cuda:
        from npr_ext.triton import paged as kernels

        return kernels.paged_attention(
            q_TNH, k_cache_SKH, v_cache_SKH, block_tables, row_of_token, lengths, factor, runs
        )
    output: Tensor = torch.ops.npr.paged_attention(
        q_TNH, k_cache_SKH, v_cache_SKH, block_tables, row_of_token, lengths, factor
    )
    return output
