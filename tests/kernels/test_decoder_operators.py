"""The engine's operators between the attentions against their definitions in float64 PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npr_ext import categorical, linear, rms_norm, silu_mul, split_heads
from npr_ext.ops import differentiable

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 10**6)
EPS = 1e-6


def random_tensor(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the type's tolerance of the largest magnitude."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if actual.numel():
        scale = max(1.0, float(expected.abs().max()))
        assert float((actual.double() - expected).abs().max()) <= TOLERANCE[dtype] * scale


@settings(max_examples=60)
@given(SEEDS, DTYPES, st.integers(0, 130), st.integers(1, 150), st.integers(1, 90), st.booleans())
def test_linear_is_x_times_the_transposed_weight(
    seed: int, dtype: torch.dtype, rows: int, inside: int, outside: int, biased: bool
) -> None:
    x, weight = random_tensor(seed, dtype, rows, inside), random_tensor(seed + 1, dtype, outside, inside)
    bias = random_tensor(seed + 2, dtype, outside) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(linear(x, weight, bias), expected, dtype)


@pytest.mark.parametrize("rows", [12, 80])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_on_strided_input_and_any_number_of_threads(threads: int, rows: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = (
            random_tensor(0, torch.float32, 640, rows).T,
            random_tensor(1, torch.float32, 999, 1280)[:, ::2],
        )
        assert_close(linear(x, weight), x.double() @ weight.double().T, torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inside", [576, 1536, 4096])
@pytest.mark.parametrize("rows", [2, 12, 52])
def test_the_rounding_error_of_linear_is_at_most_twice_pytorchs(rows: int, inside: int) -> None:
    generator = torch.Generator().manual_seed(inside + rows)
    x, weight = (torch.rand(count, inside, generator=generator) for count in (rows, 64))
    exact = x.double() @ weight.double().T
    ours, theirs = (
        float((product.double() / exact - 1).square().mean().sqrt())
        for product in (linear(x, weight), F.linear(x, weight))
    )
    assert ours <= 2 * theirs


@settings(max_examples=40)
@given(SEEDS, DTYPES, st.integers(0, 40), st.integers(1, 200))
def test_rms_norm(seed: int, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = random_tensor(seed, dtype, rows, size), random_tensor(seed + 1, dtype, size)
    expected = F.rms_norm(x.double(), (size,), weight.double(), EPS)
    assert_close(rms_norm(x, weight, EPS), expected, dtype)


@settings(max_examples=40)
@given(SEEDS, DTYPES, st.integers(0, 40), st.integers(1, 100), st.sampled_from([1.0, 30.0, 1000.0]))
def test_silu_mul(seed: int, dtype: torch.dtype, rows: int, size: int, magnitude: float) -> None:
    gate_up = random_tensor(seed, dtype, rows, 2 * size) * magnitude
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(silu_mul(gate_up), F.silu(gate) * up, dtype)


@settings(max_examples=60)
@given(
    SEEDS,
    DTYPES,
    st.integers(0, 30),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([2, 6, 16, 64, 128, 256]),
    st.booleans(),
)
def test_split_heads_normalises_rotates_and_stores(
    seed: int, dtype: torch.dtype, tokens: int, groups: int, queries: int, dim: int, qk_norm: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    qkv = random_tensor(seed, dtype, tokens, groups * (queries + 2) * dim)
    norms = [random_tensor(seed + 1 + i, dtype, dim) if qk_norm else None for i in range(2)]
    angles = random_tensor(seed + 3, torch.float64, 50, dim // 2) * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = torch.randint(50, (tokens,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(tokens + 5, generator=generator)[:tokens].int()
    k_cache, v_cache = (random_tensor(seed + 4 + i, dtype, tokens + 5, groups, dim) for i in range(2))
    k_before, v_before = k_cache.clone(), v_cache.clone()

    actual = split_heads(qkv, norms[0], norms[1], cos, sin, positions, slots, k_cache, v_cache, EPS)

    heads = qkv.double().view(tokens, groups, queries + 2, dim)
    q, k, v = heads[:, :, :-2], heads[:, :, -2:-1], heads[:, :, -1]
    if qk_norm:
        q, k = (
            F.rms_norm(x, (dim,), w.double(), EPS)
            for x, w in zip((q, k), norms, strict=True)
            if w is not None
        )
    turn = torch.complex(cos.double(), sin.double())[positions.long()][:, None, None]
    rotated = [
        torch.complex(x[..., : dim // 2].contiguous(), x[..., dim // 2 :].contiguous()) * turn for x in (q, k)
    ]
    q, k = (torch.cat((x.real, x.imag), -1) for x in rotated)
    assert_close(actual, q.reshape(tokens, groups * queries, dim), dtype)
    assert_close(k_cache[slots.long()], k[:, :, 0], dtype)
    assert torch.equal(v_cache[slots.long()].double(), v)
    untouched = torch.ones(tokens + 5, dtype=torch.bool)
    untouched[slots.long()] = False
    assert torch.equal(k_cache[untouched], k_before[untouched])
    assert torch.equal(v_cache[untouched], v_before[untouched])


def heads_job(**changed: Tensor) -> dict[str, Any]:
    """Valid arguments of split_heads, some of them changed."""
    job = {
        "qkv_TC": torch.zeros(2, 4 * 8),
        "query_norm_H": None,
        "key_norm_H": None,
        "cos_Ph": torch.ones(5, 4),
        "sin_Ph": torch.zeros(5, 4),
        "positions": torch.tensor([0, 4], dtype=torch.int32),
        "slots": torch.tensor([0, 2], dtype=torch.int32),
        "k_cache_SGH": torch.zeros(3, 1, 8),
        "v_cache_SGH": torch.zeros(3, 1, 8),
        "eps": EPS,
    }
    return job | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": torch.tensor([0, 5], dtype=torch.int32)}, "position 5.*table holds 5"),
        ({"positions": torch.tensor([0, -1], dtype=torch.int32)}, "position -1"),
        ({"slots": torch.tensor([3, 0], dtype=torch.int32)}, "slot 3 of a cache of 3"),
        ({"slots": torch.tensor([0, 1])}, "int32"),
        ({"qkv_TC": torch.zeros(2, 30)}, "does not fit"),
        ({"qkv_TC": torch.zeros(2, 16)}, "does not fit"),
        ({"cos_Ph": torch.ones(5, 8)}, "cos and sin"),
        ({"sin_Ph": torch.ones(5, 4).double()}, "must have qkv's type"),
        ({"query_norm_H": torch.ones(4)}, "norm of heads"),
        ({"v_cache_SGH": torch.zeros(4, 1, 8)}, "alike"),
        ({"k_cache_SGH": torch.zeros(3, 1, 16)[..., ::2]}, "contiguous"),
    ],
)
def test_split_heads_refuses_what_does_not_fit(changed: dict[str, Tensor], message: str) -> None:
    assert split_heads(**heads_job()).shape == (2, 2, 8)
    with pytest.raises(ValueError, match=message):
        split_heads(**heads_job(**changed))


def test_operators_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="differ in type"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3).double())
    with pytest.raises(ValueError, match="bias"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="not Half"):
        linear(torch.zeros(2, 3).half(), torch.zeros(4, 3).half())
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), EPS)
    with pytest.raises(ValueError, match="2F"):
        silu_mul(torch.zeros(2, 3))


@settings(max_examples=60)
@given(
    SEEDS,
    DTYPES,
    st.one_of(st.integers(1, 200), st.integers(500, 1100)),
    st.sampled_from([1.0, 20.0]),
    st.booleans(),
    st.sampled_from([1.0, 0.6, 1.7]),
)
def test_categorical_is_the_inverse_of_the_cumulative_softmax(
    seed: int,
    dtype: torch.dtype,
    vocabulary: int,
    magnitude: float,
    some_impossible: bool,
    temperature: float,
) -> None:
    row = random_tensor(seed, dtype, vocabulary) * magnitude
    if some_impossible and vocabulary > 1:
        row[:: 1 + seed % 3 + 1] = -torch.inf
        row[-1] = 0.0
    uniforms = torch.cat([torch.arange(997, dtype=torch.float64) / 997, torch.tensor([1 - 2.0**-53])])
    temperatures = torch.full((len(uniforms),), temperature)
    indices, policy, logprobs = categorical(row.expand(len(uniforms), -1), uniforms, temperatures)
    at_one = row.double().log_softmax(0)[indices]
    assert (policy.double() - at_one).abs().max() <= 1e-5 * max(1.0, float(at_one.abs().max()))
    expected = (row.double() / temperatures[0].double()).log_softmax(0)
    assert torch.isfinite(expected[indices]).all()  # nothing impossible is drawn
    assert (logprobs.double() - expected[indices]).abs().max() <= 1e-5 * max(
        1.0, float(expected[indices].abs().max())
    )
    below = torch.cat([torch.zeros(1, dtype=torch.float64), expected.exp().cumsum(0)])
    slack = 1e-6  # of weights in float32
    assert (below[indices] <= uniforms + slack).all()
    assert (uniforms <= below[indices + 1] + slack).all()


def test_categorical_shows_nan_and_refuses_what_does_not_fit() -> None:
    logits = torch.zeros(4, 40)
    logits[1, 7], logits[2, 39], logits[3] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 0.7, 1.0):
        given = torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), temperature)
        assert categorical(logits, *given)[1].isnan().tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="float64"):
        categorical(logits, torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="temperatures"):
        categorical(logits, torch.zeros(4, dtype=torch.float64), torch.ones(3))
    with pytest.raises(ValueError, match="not Half"):
        categorical(logits.half(), torch.zeros(4, dtype=torch.float64), torch.ones(4))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("vocabulary", [1, 7, 511, 512, 513, 1025, 49_152])
def test_categorical_is_greedy_at_temperature_zero(dtype: torch.dtype, vocabulary: int) -> None:
    logits = random_tensor(vocabulary, dtype, 5, vocabulary) * 3
    logits[3, vocabulary // 2 :] = -torch.inf
    logits[3, 0] = 1.0
    indices, policy, sampler = categorical(logits, torch.rand(5, dtype=torch.float64), torch.zeros(5))
    assert torch.equal(logits.gather(1, indices[:, None])[:, 0], logits.amax(1))
    assert (indices == logits.float().argmax(1)).all() or dtype == torch.bfloat16
    expected = logits.double().log_softmax(1).gather(1, indices[:, None])[:, 0]
    assert (policy.double() - expected).abs().max() <= 1e-5
    assert not sampler.any()


@settings(max_examples=60)
@given(SEEDS, DTYPES, st.sampled_from([(), (3,), (2, 5)]), st.integers(0, 300), st.integers(1, 70))
def test_gradients_of_the_norm_are_those_of_its_definition(
    seed: int, dtype: torch.dtype, leading: tuple[int, ...], rows: int, size: int
) -> None:
    x = random_tensor(seed, dtype, *leading, rows, size).requires_grad_()
    weight = random_tensor(seed + 1, dtype, size).requires_grad_()
    normed = differentiable.rms_norm(x, weight, EPS)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    factor = torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + EPS)
    exact = exact_x * factor * exact_weight
    assert_close(normed.detach(), exact.detach(), dtype)
    above = random_tensor(seed + 2, dtype, *x.shape)
    ours = torch.autograd.grad((normed * above).sum(), (x, weight))
    theirs = torch.autograd.grad((exact * above.double()).sum(), (exact_x, exact_weight))
    # The gradient of x is a difference of two terms of the first one's size, which a short row makes as large as 1 / |x|;
    # that of the weight a sum over all rows.
    term = float((factor * exact_weight * above).abs().max()) if rows else 1.0
    assert_close(ours[0] / max(1.0, term), theirs[0] / max(1.0, term), dtype)
    weighed = max(1.0, float((exact_x * factor * above).abs().sum(tuple(range(x.dim() - 1))).max()))
    assert_close(ours[1] / weighed, theirs[1] / weighed, dtype)


@settings(max_examples=60)
@given(SEEDS, DTYPES, st.sampled_from([(), (3,)]), st.integers(0, 100), st.integers(1, 70))
def test_gradients_of_swiglu_are_those_of_its_definition(
    seed: int, dtype: torch.dtype, leading: tuple[int, ...], rows: int, size: int
) -> None:
    gate_up = (30 * random_tensor(seed, dtype, *leading, rows, 2 * size)).requires_grad_()
    product = differentiable.silu_mul(gate_up)
    exact_gate_up = gate_up.detach().double().requires_grad_()
    gate, up = exact_gate_up.chunk(2, dim=-1)
    exact = F.silu(gate) * up
    assert_close(product.detach(), exact.detach(), dtype)
    above = random_tensor(seed + 1, dtype, *product.shape)
    (ours,) = torch.autograd.grad((product * above).sum(), (gate_up,))
    (theirs,) = torch.autograd.grad((exact * above.double()).sum(), (exact_gate_up,))
    assert_close(ours, theirs, dtype)
