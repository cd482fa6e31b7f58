"""Drawing from logits on a GPU, in Triton: logits are read once, and the drawn part of a row once more.

    parts    a program for each (row, part of the vocabulary): greatest logit, its place, sums of exp at both temperatures
    rows     a program for each row: sums over parts, the part in which the uniform number falls, its place in there

Sums are float64, in a fixed order: what is drawn does not depend on what else is in the batch. Shapes of
launches depend on shapes of tensors alone. Triton's interpreter (TRITON_INTERPRET=1) runs this on a CPU.

S rows, V vocabulary, P parts of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 4096  # logits of a part


@triton.jit
def _parts(
    logits_SV,
    temperatures_S,
    largest_SP,
    place_SP,
    policy_SP,
    sampler_SP,
    size,
    num_parts,
    part_size: tl.constexpr,
    wide: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * part_size + tl.arange(0, part_size)
    x = tl.load(logits_SV + row * size + i, mask=i < size, other=float("-inf")).to(wide)
    temperature = tl.load(temperatures_S + row)
    sharpness = (1.0 / tl.where(temperature == 0.0, 1.0, temperature)).to(wide)
    largest = tl.max(x, 0)
    # A part without any probability adds nothing; NaN and +inf make all that they are summed into NaN.
    above = tl.where(x == float("-inf"), float("-inf"), x - largest)
    at = row * num_parts + part
    tl.store(largest_SP + at, largest)
    tl.store(place_SP + at, tl.min(tl.where(x == largest, i, size - 1), 0))
    tl.store(policy_SP + at, tl.sum(tl.exp(above).to(tl.float64), 0))
    tl.store(sampler_SP + at, tl.sum(tl.exp(above * sharpness).to(tl.float64), 0))


@triton.jit
def _rows(
    logits_SV,
    uniforms_S,
    temperatures_S,
    largest_SP,
    place_SP,
    policy_SP,
    sampler_SP,
    indices_S,
    out_policy_S,
    out_sampler_S,
    size,
    num_parts,
    part_size: tl.constexpr,
    block_parts: tl.constexpr,
    wide: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_S + row)
    greedy = temperature == 0.0
    sharpness = (1.0 / tl.where(greedy, 1.0, temperature)).to(wide)

    part = tl.arange(0, block_parts)
    at, there = row * num_parts + part, part < num_parts
    largest_P = tl.load(largest_SP + at, mask=there, other=float("-inf"))
    largest = tl.max(largest_P, 0)
    below_P = tl.where(largest_P == float("-inf"), float("-inf"), largest_P - largest)
    policy = tl.sum(tl.load(policy_SP + at, mask=there, other=0.0) * tl.exp(below_P).to(tl.float64), 0)
    shrink_P = tl.exp(below_P * sharpness).to(tl.float64)
    mass_P = tl.load(sampler_SP + at, mask=there, other=0.0) * shrink_P
    reached_P = tl.cumsum(mass_P, 0)
    total = tl.sum(tl.where(part == num_parts - 1, reached_P, 0.0), 0)
    wanted = tl.load(uniforms_S + row).to(tl.float64) * total
    last = tl.max(tl.where(mass_P > 0.0, part, 0), 0)  # rounding must not lead beyond what has probability
    chosen = tl.minimum(tl.sum((reached_P <= wanted).to(tl.int32), 0), last)
    before = tl.sum(tl.where(part == chosen - 1, reached_P, 0.0), 0)

    inside = tl.arange(0, part_size)
    i = chosen * part_size + inside
    x = tl.load(logits_SV + row * size + i, mask=i < size, other=float("-inf")).to(wide)
    of_part = tl.load(largest_SP + row * num_parts + chosen)
    above = tl.where(x == float("-inf"), float("-inf"), x - of_part)
    shrink = tl.sum(tl.where(part == chosen, shrink_P, 0.0), 0)
    weight = tl.exp(above * sharpness).to(tl.float64) * shrink
    reached = before + tl.cumsum(weight, 0)
    last = tl.max(tl.where(weight > 0.0, inside, 0), 0)
    drawn = chosen * part_size + tl.minimum(tl.sum((reached <= wanted).to(tl.int32), 0), last)

    highest_part = tl.min(tl.where(largest_P == largest, part, num_parts - 1), 0)
    best = tl.load(place_SP + row * num_parts + highest_part)
    index = tl.minimum(tl.where(greedy, best, drawn), size - 1)
    score = tl.load(logits_SV + row * size + index).to(wide) - largest
    tl.store(indices_S + row, index.to(tl.int64))
    # A row with NaN somewhere has NaN for its sums, and so for its log-probabilities.
    tl.store(out_policy_S + row, (score.to(tl.float64) - tl.log(policy)).to(wide))
    sampler = ((score * sharpness).to(tl.float64) - tl.log(total)).to(wide)
    tl.store(out_sampler_S + row, tl.where(greedy, 0.0, sampler).to(wide))


def categorical(
    logits_SV: Tensor, uniforms_S: Tensor, temperatures_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(index, log-probability at temperature 1, and at the row's), each [S]; see npr_ext.ops.decoder."""
    logits_SV = logits_SV.contiguous()
    num_rows, size = logits_SV.shape
    exact = logits_SV.dtype == torch.float64
    dtype, wide = (torch.float64, tl.float64) if exact else (torch.float32, tl.float32)
    device, num_parts = logits_SV.device, triton.cdiv(size, PART)
    indices_S = torch.empty(num_rows, dtype=torch.int64, device=device)
    policy_S, sampler_S = (torch.empty(num_rows, dtype=dtype, device=device) for _ in range(2))
    if num_rows == 0:
        return indices_S, policy_S, sampler_S
    largest_SP = torch.empty(num_rows, num_parts, dtype=dtype, device=device)
    place_SP = torch.empty(num_rows, num_parts, dtype=torch.int32, device=device)
    sums = [torch.empty(num_rows, num_parts, dtype=torch.float64, device=device) for _ in range(2)]
    parts = (largest_SP, place_SP, *sums)
    _parts[(num_rows, num_parts)](
        logits_SV, temperatures_S, *parts, size, num_parts, part_size=PART, wide=wide, num_warps=8
    )
    _rows[(num_rows,)](
        logits_SV,
        uniforms_S,
        temperatures_S,
        *parts,
        indices_S,
        policy_S,
        sampler_S,
        size,
        num_parts,
        part_size=PART,
        block_parts=triton.next_power_of_2(num_parts),
        wide=wide,
        num_warps=8,
    )
    return indices_S, policy_S, sampler_S
