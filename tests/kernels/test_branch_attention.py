"""Branch attention against dense masked softmax, forward and backward."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from npr_ext import BranchLayout, branch_attention, branch_layout
from npr_ext.layout.reference import reference_attention
from npr_ext.testing import TAGS, random_layout

HEADS = [(4, 2, 32), (9, 3, 64), (2, 2, 20), (3, 1, 128)]


def packed_layout(seed: int, lengths: list[int], pads: int = 3) -> BranchLayout:
    """Sequences of `lengths` tokens, of two blocks each, and some pad tokens in one row."""
    samples = [random_layout(seed + i, length, 2, 3, 0.6) for i, length in enumerate(lengths)]
    ids = torch.cat([sample.token_ids for sample in samples] + [torch.zeros(pads, dtype=torch.int64)])
    sizes = lengths + [1] * pads
    return branch_layout(
        ids,
        tags=TAGS,
        prompt_lengths=torch.tensor([sample.prompt_length for sample in samples] + [0] * pads),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0),
    )


def shared_prompt_layout() -> tuple[BranchLayout, BranchLayout, torch.Tensor]:
    """A prompt with three responses: shared, unshared, and for every unshared token its index in the shared row."""
    samples = [random_layout(seed, 300, 2, 3, 0.6) for seed in range(3)]
    prompt = samples[0].token_ids[: samples[0].prompt_length]
    responses = [sample.token_ids[sample.prompt_length :] for sample in samples]
    sizes = [len(prompt), *(len(response) for response in responses)]
    shared = branch_layout(
        torch.cat([prompt, *responses]),
        tags=TAGS,
        prompt_lengths=torch.tensor([len(prompt), 0, 0, 0]),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0),
        parents=torch.tensor([-1, 0, 0, 0]),
    )
    unshared = branch_layout(
        torch.cat([torch.cat([prompt, response]) for response in responses]),
        tags=TAGS,
        prompt_lengths=torch.full((3,), len(prompt)),
        cu_seqlens=torch.tensor([0, *(len(prompt) + size for size in sizes[1:])]).cumsum(0),
    )
    starts = torch.tensor(sizes).cumsum(0)
    rows = [
        torch.cat([torch.arange(len(prompt)), torch.arange(int(starts[i]), int(starts[i + 1]))])
        for i in range(3)
    ]
    return shared, unshared, torch.cat(rows)


def random_inputs(
    seed: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """q, k, v that need gradients, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, dim = heads

    def randn(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, dim, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (randn(count).requires_grad_() for count in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v, randn(num_heads)


def run(layout: BranchLayout, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of q, k and v."""
    *qkv, gradient = inputs
    output = branch_attention(*qkv, layout)
    return output.detach(), *torch.autograd.grad(output, qkv, gradient)


def run_reference(layout: BranchLayout, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    *qkv, gradient = (each.detach().double().requires_grad_() for each in inputs)
    output = reference_attention(*qkv, layout.visible(), qkv[0].shape[-1] ** -0.5)
    return output.detach(), *torch.autograd.grad(output, qkv, gradient)


def largest_errors(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[float]:
    return [float((a.double() - e).abs().max()) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[120], [700], [130, 110, 400, 160]])
def test_it_equals_dense_masked_softmax_with_its_gradients(
    lengths: list[int], heads: tuple[int, int, int]
) -> None:
    layout = packed_layout(0, lengths)
    inputs = random_inputs(1, layout.num_tokens, heads)
    assert max(largest_errors(run(layout, inputs), run_reference(layout, inputs))) < 1e-12


def test_the_causal_layout_is_causal_attention() -> None:
    layout = random_layout(2, 700).layout(branching=False)
    inputs = random_inputs(3, 700, (4, 2, 32))
    q, k, v = (each.detach().transpose(0, 1) for each in inputs[:3])
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
    assert (run(layout, inputs)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_its_error_is_at_most_twice_that_of_dense_attention_in_the_same_type(
    dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    layout = packed_layout(4, [900, 130])
    inputs = random_inputs(5, layout.num_tokens, heads, dtype)
    exact = run_reference(layout, inputs)
    *qkv, gradient = inputs
    group = heads[0] // heads[1]
    q, k, v = qkv[0], *(each.repeat_interleave(group, 1) for each in qkv[1:])
    dense = scaled_dot_product_attention(
        *(each.transpose(0, 1)[None] for each in (q, k, v)), attn_mask=layout.visible()
    )[0].transpose(0, 1)
    dense_errors = largest_errors((dense.detach(), *torch.autograd.grad(dense, qkv, gradient)), exact)
    actual = run(layout, inputs)
    assert all(each.dtype == dtype for each in actual)
    for ours, theirs in zip(largest_errors(actual, exact), dense_errors, strict=True):
        assert 0 < ours <= 2 * theirs


def test_its_gradient_passes_gradcheck() -> None:
    layout = branch_layout(
        torch.tensor([20, 2, 4, 20, 5, 4, 21, 5, 3, 6, 22, 7, 6, 23, 24, 7, 8, 25, 9, 26, 0]),
        tags=TAGS,
        prompt_lengths=torch.tensor([1, 0]),
        cu_seqlens=torch.tensor([0, 20, 21]),
    )
    inputs = random_inputs(8, 21, (4, 2, 4))
    assert torch.autograd.gradcheck(lambda q, k, v: branch_attention(q, k, v, layout), inputs[:3])


def test_a_sibling_moves_neither_output_nor_gradient_by_one_bit() -> None:
    sample = random_layout(9, 600)
    layout = sample.layout()
    hidden = torch.nonzero(layout.branch_ids == 2)[:, 0]
    siblings = ~layout.visible()[:, hidden].any(1)
    inputs = random_inputs(10, 600, (4, 2, 32), torch.float32)
    changed = tuple(each.detach().clone().requires_grad_() for each in inputs[:3])
    with torch.no_grad():
        for each in changed:
            each[hidden] = torch.nan  # worse than any other text
    before, after = run(layout, inputs), run(layout, (*changed, inputs[3]))
    assert (siblings & (layout.branch_ids > 2)).any()
    assert torch.equal(before[0][siblings], after[0][siblings])
    assert torch.equal(before[1][siblings], after[1][siblings])


def test_results_do_not_depend_on_threads_or_repetition() -> None:
    layout = packed_layout(11, [2000, 300, 200])
    inputs = random_inputs(12, layout.num_tokens, (4, 2, 32), torch.float32)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run(layout, inputs))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_shared_prompt_gives_the_output_and_gradients_of_unshared_rows() -> None:
    shared, unshared, rows = shared_prompt_layout()
    q, k, v, _ = random_inputs(13, shared.num_tokens, (4, 2, 32))
    gradient = torch.randn(len(rows), 4, 32, dtype=torch.float64)
    apart = branch_attention(q[rows], k[rows], v[rows], unshared)
    together = branch_attention(q, k, v, shared)[rows]
    assert (apart - together).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad(apart, (q, k, v), gradient),
        torch.autograd.grad(together, (q, k, v), gradient),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-11


def test_strided_views_of_a_fused_projection_are_read_as_they_are() -> None:
    layout = packed_layout(14, [200])
    fused = torch.randn(layout.num_tokens, 2, 4 * 32, dtype=torch.float64)  # two groups of [q, q, k, v]
    q = fused[:, :, :64].reshape(-1, 4, 32)
    k, v = fused[:, :, 64:96], fused[:, :, 96:]
    assert not k.is_contiguous()
    expected = branch_attention(q, k.contiguous(), v.contiguous(), layout)
    assert torch.equal(branch_attention(q, k, v, layout), expected)


def test_the_plan_is_derived_once() -> None:
    layout = packed_layout(15, [200])
    assert layout.plan is layout.plan


@pytest.mark.parametrize(
    "shapes",
    [
        ((10, 4, 32), (10, 3, 32)),
        ((10, 4, 32), (11, 2, 32)),
        ((9, 4, 32), (9, 2, 32)),
        ((10, 4, 200), (10, 2, 200)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    layout = branch_layout(torch.arange(20, 30), tags=TAGS, prompt_lengths=0)
    with pytest.raises(ValueError, match=r"fit|dimensions|tokens"):
        branch_attention(torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1]), layout)


def test_a_tensor_that_is_no_layout_gives_no_plan() -> None:
    with pytest.raises(ValueError, match="no layout"):
        _ = BranchLayout.from_tensor(torch.full((5, 4), 9, dtype=torch.int32)).plan
