"""One case of test_triton_kernels.py: operators.py CASE."""

import itertools
import sys

import torch
from torch import Tensor

import npr_ext
from npr_ext.ops import fp8
from npr_ext.triton import categorical as triton_categorical
from npr_ext.triton import decoder as triton_decoder
from npr_ext.triton import fp8 as triton_fp8
from npr_ext.triton import paged as triton_paged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
TYPES = (torch.float32, torch.bfloat16)
# The interpreter multiplies bfloat16 matrices as if they were integers.
DOT_TYPES = (torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16)


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    difference = float((ours.cpu().double() - theirs.double()).abs().max()) if theirs.numel() else 0.0
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (ours.shape, theirs.shape)
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    assert difference <= TOLERANCE[dtype] * max(1.0, largest), difference


def attention() -> None:
    """Decoding rows, prefill chunks in runs, and tokens without keys; few programs (split keys) and many."""
    chunks = ([(1, 300)], [(1, 1), (1, 65), (1, 0)], [(18, 70), (1, 17), (5, 5)])
    shapes = ((4, 2, 32), (9, 3, 64), (2, 2, 20))
    cases = [(seed, dtype) for seed in range(3) for dtype in DOT_TYPES]
    for seed, dtype in cases:
        spans, (heads, kv_heads, dim) = chunks[seed], shapes[seed]
        generator = torch.Generator().manual_seed(seed)
        width = max(keys for _, keys in spans) + 3
        tables = torch.stack([torch.randperm(width + 5, generator=generator)[:width] for _ in spans]).int()
        rows = torch.tensor([row for row, (tokens, _) in enumerate(spans) for _ in range(tokens)]).int()
        lengths = torch.tensor(
            [keys - tokens + 1 + i if keys else 0 for tokens, keys in spans for i in range(tokens)]
        )
        q = randn(generator, dtype, len(rows), heads, dim) * 2
        k, v = (randn(generator, dtype, width + 5, kv_heads, dim) for _ in range(2))
        inputs = (q, k, v, tables, rows, lengths.int())
        exact = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
        expected = npr_ext.paged_attention(*exact).to(dtype)
        on_device = [tensor.to(DEVICE) for tensor in inputs]
        runs, first = [], 0
        for tokens, _ in spans:
            runs += [(first + i, min(16, tokens - i)) for i in range(0, tokens, 16)]
            first += tokens
        for form in (None, torch.tensor(runs, dtype=torch.int32, device=DEVICE)):
            for programs in (1, 24):
                triton_paged.PROGRAMS_WANTED = programs
                close(triton_paged.paged_attention(*on_device, dim**-0.5, form), expected, dtype)


def split_heads() -> None:
    """With and without norms; a padding token leaves the caches alone."""
    for (group, kv_heads, dim), dtype, normed in itertools.product(
        ((1, 1, 16), (3, 2, 32)), TYPES, (True, False)
    ):
        generator = torch.Generator().manual_seed(0)
        qkv = randn(generator, dtype, 5, kv_heads * (group + 2) * dim)
        norms = [randn(generator, dtype, dim) if normed else None for _ in range(2)]
        cos, sin = (randn(generator, dtype, 50, dim // 2) for _ in range(2))
        positions, slots = torch.tensor([3, 49, 0, 7, 7]).int(), torch.tensor([4, 0, 9, 1, 2]).int()
        caches = [randn(generator, dtype, 10, kv_heads, dim) for _ in range(2)]
        ours = [cache.clone().to(DEVICE) for cache in caches]
        before = ours[0][slots[-1]].clone()
        expected = npr_ext.split_heads(qkv[:4], *norms, cos, sin, positions[:4], slots[:4], *caches, 1e-6)
        slots[-1] = -1
        inputs = [
            tensor.to(DEVICE) if tensor is not None else None
            for tensor in (qkv, *norms, cos, sin, positions, slots)
        ]
        queries = triton_decoder.split_heads(*inputs, *ours, 1e-6)
        close(queries[:4], expected, dtype)
        for mine, theirs in zip(ours, caches, strict=True):
            close(mine, theirs, dtype)
        assert torch.equal(ours[0][2], before)


def rows() -> None:
    """rms_norm, add_rms_norm and silu_mul."""
    for (tokens, width), dtype in itertools.product(((0, 8), (1, 576), (3, 1500)), TYPES):
        generator = torch.Generator().manual_seed(tokens)
        x, weight = randn(generator, dtype, tokens, width), randn(generator, dtype, width)
        close(
            triton_decoder.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6),
            npr_ext.rms_norm(x, weight, 1e-6),
            dtype,
        )
        close(triton_decoder.silu_mul(x.to(DEVICE)), npr_ext.silu_mul(x), dtype)
        more = randn(generator, dtype, tokens, width)
        ours = triton_decoder.add_rms_norm(x.to(DEVICE), more.to(DEVICE), weight.to(DEVICE), 1e-6)
        for mine, theirs in zip(ours, npr_ext.add_rms_norm(x, more, weight, 1e-6), strict=True):
            close(mine, theirs, dtype)


# The interpreter loses the carry when it rounds to FP8: 31.9 becomes 16.
ROUNDED = fp8.E4M3 if DEVICE == "cuda" else torch.float32


def quantize_rows() -> None:
    """To e4m3, a scale a row; a row of zeros, and one in which the greatest is negative."""
    x = randn(torch.Generator().manual_seed(0), torch.float32, 6, 600) * torch.logspace(-6, 6, 6)[:, None]
    x[2], x[3, 7] = 0.0, -1e9
    values, scales = triton_fp8.quantize_rows(x.to(DEVICE), ROUNDED, torch.finfo(fp8.E4M3).max)
    expected_values, expected_scales = fp8.quantize_rows(x, fp8.E4M3)
    close(scales, expected_scales, torch.float32)
    close(values.float().cpu().to(fp8.E4M3).float(), expected_values.float(), torch.float32)


def quantize() -> None:
    """One scale, both layouts or one of them; shapes that no tile divides, a scale that leaves NaN."""
    for dtype, (num_rows, num_columns) in itertools.product(TYPES, ((0, 5), (3, 200), (257, 130))):
        generator = torch.Generator().manual_seed(num_rows)
        x, scale = randn(generator, dtype, num_rows, num_columns), torch.tensor(0.037)
        expected = (x.float() / scale).to(ROUNDED)
        both = [torch.empty(shape, dtype=ROUNDED, device=DEVICE) for shape in (x.shape, x.T.shape)]
        alone = [torch.empty_like(each) for each in both]
        on_device = x.to(DEVICE), scale.to(DEVICE)
        triton_fp8.quantize(*on_device, *both)
        triton_fp8.quantize(*on_device, alone[0], None)
        triton_fp8.quantize(*on_device, None, alone[1])
        for rows_RC, columns_CR in (both, alone):
            close(rows_RC.float(), expected.float(), torch.float32)
            close(columns_CR.float(), expected.T.float(), torch.float32)
    broken = torch.empty(2, 3, dtype=ROUNDED, device=DEVICE)
    infinite = torch.tensor([[1.0, torch.inf, -torch.inf]] * 2, device=DEVICE)
    triton_fp8.quantize(infinite, torch.tensor(torch.inf, device=DEVICE), broken, None)
    assert broken.float().cpu().isnan().tolist() == [[False, True, True]] * 2


def categorical() -> None:
    """Draws equal those of plain PyTorch: distributions truncated, uniform numbers at both ends, one and several parts."""
    generator = torch.Generator().manual_seed(0)
    for size, part in ((57, 4096), (57, 16), (3000, 512)):
        triton_categorical.PART = part
        logits = randn(generator, torch.float32, 60, size) * 4
        logits[::3, ::2] = -torch.inf
        logits[5, :40], logits[6, 20:] = -torch.inf, -torch.inf  # whole parts without probability
        uniforms = torch.rand(60, generator=generator, dtype=torch.float64)
        uniforms[::7], uniforms[1::7] = 0.0, 1.0 - 2**-53
        temperatures = torch.tensor([0.0, 0.7, 1.0, 1.3]).repeat(15)
        given = logits, uniforms, temperatures
        indices, *logprobs = npr_ext.categorical(*given)
        ours, *our_logprobs = (
            tensor.cpu() for tensor in triton_categorical.categorical(*(each.to(DEVICE) for each in given))
        )
        same = ours == indices
        assert same.float().mean() > 0.85 and same[temperatures == 0].all()
        # Where sums of another order fall on the other side of a border, by no more than rounding.
        sharpness = torch.where(temperatures == 0, 1.0, 1 / temperatures).double()
        reached = (logits.double() * sharpness[:, None]).softmax(-1).cumsum(-1)
        for row in torch.nonzero(~same)[:, 0].tolist():
            borders = reached[row, [ours[row], indices[row]]]
            assert (borders - uniforms[row]).abs().min() < 1e-6, (row, borders, uniforms[row])
        assert torch.isfinite(logits[torch.arange(60), ours]).all()
        for mine, theirs in zip(our_logprobs, logprobs, strict=True):
            close(mine[same], theirs[same], torch.float32)


def broken_rows() -> None:
    """NaN and +inf anywhere in a row make its log-probability NaN and leave the others alone."""
    triton_categorical.PART = 16
    logits = randn(torch.Generator().manual_seed(0), torch.float32, 8, 57)
    sound = torch.ones(8, dtype=torch.bool)
    for row, place, value in ((1, 0, torch.nan), (3, 50, torch.nan), (4, 56, torch.inf), (6, 20, torch.inf)):
        logits[row, place], sound[row] = value, False
    uniforms, temperatures = torch.full((8,), 0.5, dtype=torch.float64), torch.tensor([0.0, 1.0]).repeat(4)
    given = logits, uniforms, temperatures
    expected, *_ = npr_ext.categorical(*given)
    indices, policy, _ = (
        tensor.cpu() for tensor in triton_categorical.categorical(*(t.to(DEVICE) for t in given))
    )
    assert torch.equal(policy.isnan(), ~sound), policy
    assert torch.equal(indices[sound], expected[sound])
    assert ((indices >= 0) & (indices < 57)).all()


CASES = {
    case.__name__: case
    for case in (attention, split_heads, rows, quantize_rows, quantize, categorical, broken_rows)
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
    print("equal")
