"""The engine's operators besides attention: a decoder layer's, and drawing from logits; forward only.

T tokens, D hidden, F feed-forward, G key/value heads, N query heads per key/value head, H head dim, S slots,
P positions. All take float32, float64 or bfloat16 (then computed in float32, rounded once at the end) and
raise ValueError for a shape, type, position or slot that does not fit. CUDA tensors go to
npr_ext.triton.decoder, which computes in float32 and cannot look at positions and slots.
"""

from types import ModuleType

import torch
from torch import Tensor

from npr_ext import library  # noqa: F401  (registers torch.ops.npr)


def _gpu() -> ModuleType:
    """The kernels for CUDA tensors. Triton is there wherever torch was built for CUDA, and only there."""
    from npr_ext.triton import decoder as kernels

    return kernels


def categorical(
    logits_SV: Tensor, uniforms_S: Tensor, temperatures_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A draw from each row's softmax: (index int64 [S], its log-probability at temperature 1, and at the row's).

    The index is the first whose cumulative probability exceeds the uniform number (in [0, 1), float64; summed
    in float64, so no mass is lost), at temperature 0 the greatest logit's, whose last result is 0.
    Temperatures are float32. Logits may be -inf; a row with NaN or +inf has log-probability NaN. Results are
    float32, float64 for float64 logits.
    """
    if logits_SV.is_cuda:
        from npr_ext.triton import categorical as kernels

        return kernels.categorical(logits_SV, uniforms_S, temperatures_S)
    indices, policy, sampler = torch.ops.npr.categorical(logits_SV, uniforms_S, temperatures_S)
    return indices, policy, sampler


def linear(x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D]; right for any T, meant for the 1 to some hundred rows of a decode step or
    a prefill chunk: the weight is read from where it lies, never packed. A row has the same bits whatever
    rows are beside it. bfloat16 is summed in float32, at AVX512_BF16 by the processor's own products of
    bfloat16 pairs (subnormal numbers then count as zero)."""
    product: Tensor = torch.ops.npr.linear(x_TC, weight_DC, bias_D)
    return product


def num_threads() -> int:
    """CPU threads that the operators use when this thread calls them."""
    return int(torch.ops.npr.num_threads())


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), [T, D]."""
    if x_TD.is_cuda:
        return _gpu().rms_norm(x_TD, weight_D, eps)
    normed: Tensor = torch.ops.npr.rms_norm(x_TD, weight_D, eps)
    return normed


def add_rms_norm(x_TD: Tensor, more_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + more, and its rms_norm), [T, D] both: between two parts of a layer; one launch on a GPU."""
    if x_TD.is_cuda:
        return _gpu().add_rms_norm(x_TD, more_TD, weight_D, eps)
    sum_TD = x_TD + more_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] (SwiGLU, Shazeer 2020), [T, F] from [T, 2F]."""
    if gate_up_TF.is_cuda:
        return _gpu().silu_mul(gate_up_TF)
    product: Tensor = torch.ops.npr.silu_mul(gate_up_TF)
    return product


def split_heads(
    qkv_TC: Tensor,
    query_norm_H: Tensor | None,
    key_norm_H: Tensor | None,
    cos_Ph: Tensor,
    sin_Ph: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache_SGH: Tensor,
    v_cache_SGH: Tensor,
    eps: float,
) -> Tensor:
    """Queries [T, G * N, H], normalised and rotated; keys (likewise) and values are written to their slots.

    Args:
        qkv_TC: Megatron's fused projection: for each of G groups N query heads, a key head and a value head.
        query_norm_H: RMSNorm weight of the query heads, None for models without qk-norm.
        key_norm_H: likewise of the key heads.
        cos_Ph: cosine of each position's angles, [P, H / 2]; half rotation, dimension i with i + H / 2.
        sin_Ph: sine likewise.
        positions: int32 [T] in [0, P).
        slots: int32 [T], distinct, in [0, S).
        k_cache_SGH: contiguous; written in place.
        v_cache_SGH: contiguous; written in place.
        eps: of the norms.
    """
    if qkv_TC.is_cuda:
        return _gpu().split_heads(
            qkv_TC,
            query_norm_H,
            key_norm_H,
            cos_Ph,
            sin_Ph,
            positions,
            slots,
            k_cache_SGH,
            v_cache_SGH,
            eps,
        )
    queries: Tensor = torch.ops.npr.split_heads(
        qkv_TC,
        query_norm_H,
        key_norm_H,
        cos_Ph,
        sin_Ph,
        positions,
        slots,
        k_cache_SGH,
        v_cache_SGH,
        eps,
    )
    return queries
