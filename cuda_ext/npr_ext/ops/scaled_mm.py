"""The product of FP8 matrices under scales, by one definition for both devices.

A GPU multiplies by torch._scaled_mm. On a CPU that function has one result or another, or none: oneDNN's
where the processor has AMX, which fails where oneDNN has no FP8 for the instructions it may use, and
elsewhere a plain one that takes layouts which no GPU takes. So a CPU multiplies the same numbers in float32,
where the product of any two is exact.
"""

import torch
from torch import Tensor

ALIGNMENT = 16  # of K and N, by torch._scaled_mm


def scaled_mm(
    a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """(a * scale_a) @ (b * scale_b), [M, N] in `dtype`, from e4m3 or e5m2, not both e5m2.

    Scales are float32: one a matrix, [], or one for each row of a and column of b, [M, 1] and [1, N] (on a
    GPU to bf16 alone). b is the transpose of a row-major matrix. `fast` leaves sums to the tensor cores,
    without it they are added up in float32.
    """
    _check_layout(a_MK, b_KN)
    if a_MK.is_cuda and len(a_MK):
        return torch._scaled_mm(
            a_MK, b_KN, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast
        )
    # By name, not by @: that is another library's in megatron_npr.repairs.megatron_on_cpu, except where layers are recomputed.
    return (torch.mm(a_MK.float(), b_KN.float()) * scale_a * scale_b).to(dtype)


def _check_layout(a_MK: Tensor, b_KN: Tensor) -> None:
    """What a GPU asks for, on every device, so that tests on a CPU hold callers to it."""
    assert a_MK.is_contiguous(), "a has to be row-major"
    assert b_KN.t().is_contiguous(), "b has to be column-major"
    assert not any(count % ALIGNMENT for count in b_KN.shape), (
        f"{list(b_KN.shape)}: no multiples of {ALIGNMENT}"
    )
    assert torch.float8_e4m3fn in (a_MK.dtype, b_KN.dtype), "no product of two e5m2 matrices"
