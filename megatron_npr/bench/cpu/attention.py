"""`npr bench attention`: branch attention on the CPU, forward and backward, against PyTorch's dense causal attention.

time / visible pair, and its ratio to dense SDPA's ─► memory at three sizes ─► error against float64 ─► shared prompts
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_npr.bench.cpu import model_step
from megatron_npr.bench.cpu.model_step import GROUP, PROMPT, RESPONSE, response_ids
from megatron_npr.bench.timing import median_seconds, peak_bytes
from npr_ext import BranchLayout, branch_attention, branch_layout
from npr_ext.testing import TAGS, random_layout

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
TOKENS = 1 << 13
BLOCKS, BRANCHES, STEP_SHARE = 3, 5, 0.9
MEMORY_TOKENS = (1 << 11, 1 << 13, 1 << 15)
ERROR_TOKENS = 1 << 10


def measure() -> dict[str, object]:
    """Time, memory and error of branch attention and of the block mask on the CPU, as JSON data."""
    return {
        "threads": torch.get_num_threads(),
        "shape": {"tokens": TOKENS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        "speed": speed(),
        "bytes_per_token": {
            tokens: peak_bytes(functools.partial(prepare_pass, tokens)) / tokens for tokens in MEMORY_TOKENS
        },
        "error": errors(),
        "shared_prompt": {"attention": shared_prompt(), "model_step": model_step.measure()},
    }


def speed() -> dict[str, float]:
    """Forward and backward: ns a visible pair and head, of ours and of dense causal SDPA at the same length."""
    layout = standard_layout(TOKENS)
    ours = median_seconds(forward_backward(layout, torch.float32), repeats=5)
    dense = median_seconds(dense_forward_backward(TOKENS), repeats=3)
    pairs, dense_pairs = layout.visible_pairs(), TOKENS * (TOKENS + 1) // 2
    ours_ns, dense_ns = 1e9 * ours / (pairs * HEADS), 1e9 * dense / (dense_pairs * HEADS)
    return {
        "visible_share_of_causal": pairs / dense_pairs,
        "seconds": ours,
        "dense_seconds": dense,
        "ns_per_pair": ours_ns,
        "dense_ns_per_pair": dense_ns,
        "ratio_per_pair": ours_ns / dense_ns,
        "times_faster": dense / ours,
    }


def errors() -> dict[str, float]:
    """Largest error of output and gradients in float32 against float64, ours and SDPA's with a dense mask."""
    layout = standard_layout(ERROR_TOKENS)
    exact = dense_pass(layout, torch.float64)
    ours = forward_backward(layout, torch.float32, seed=1)()
    dense = dense_pass(layout, torch.float32)
    return {
        "ours": max(float((a.double() - e).abs().max()) for a, e in zip(ours, exact, strict=True)),
        "sdpa": max(float((a.double() - e).abs().max()) for a, e in zip(dense, exact, strict=True)),
    }


def shared_prompt() -> dict[str, float]:
    """A group that shares its prompt in a row, against as many rows with the prompt each."""
    shared, unshared = group_layouts()
    together = median_seconds(forward_backward(shared, torch.float32), repeats=5)
    apart = median_seconds(forward_backward(unshared, torch.float32), repeats=5)
    return {
        "shared_seconds": together,
        "unshared_seconds": apart,
        "times_faster": apart / together,
        "pairs_allow": unshared.visible_pairs() / shared.visible_pairs(),
    }


def standard_layout(tokens: int) -> BranchLayout:
    """3 blocks of 5 branches that hold 90 % of the tokens."""
    return random_layout(0, tokens, BLOCKS, BRANCHES, STEP_SHARE).layout()


def group_layouts() -> tuple[BranchLayout, BranchLayout]:
    """(the group behind one prompt, every response behind its own copy)."""
    text = torch.full((PROMPT + RESPONSE,), 20)
    responses = [response_ids(index) for index in range(GROUP)]
    bounds = PROMPT + RESPONSE * torch.arange(GROUP + 1)
    shared = branch_layout(
        torch.cat([text[:PROMPT], *responses]),
        tags=TAGS,
        prompt_lengths=torch.tensor([PROMPT] + [0] * GROUP),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), bounds]),
        parents=torch.tensor([-1] + [0] * GROUP),
    )
    unshared = branch_layout(
        torch.cat([torch.cat([text[:PROMPT], response]) for response in responses]),
        tags=TAGS,
        prompt_lengths=torch.full((GROUP,), PROMPT),
        cu_seqlens=(PROMPT + RESPONSE) * torch.arange(GROUP + 1),
    )
    assert not shared.violations() and not unshared.violations()
    return shared, unshared


def inputs(tokens: int, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], Tensor]:
    """(q, k, v that want gradients, the gradient of the output); the same numbers for every type."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS), (tokens, HEADS))
    *qkv, gradient = (torch.randn(*shape, HEAD_DIM, generator=generator).to(dtype) for shape in shapes)
    return [tensor.requires_grad_() for tensor in qkv], gradient


def forward_backward(
    layout: BranchLayout, dtype: torch.dtype, *, seed: int = 0
) -> Callable[[], tuple[Tensor, ...]]:
    """Work: output and the gradients of q, k, v by branch_attention."""
    (q, k, v), gradient = inputs(layout.num_tokens, dtype, seed)

    def work() -> tuple[Tensor, ...]:
        output = branch_attention(q, k, v, layout)
        return output.detach(), *torch.autograd.grad(output, (q, k, v), gradient)

    return work


def prepare_pass(tokens: int) -> Callable[[], tuple[Tensor, ...]]:
    """The standard case at a size, with everything loaded that a first call loads."""
    forward_backward(standard_layout(1024), torch.float32)()
    return forward_backward(standard_layout(tokens), torch.float32)


def dense_forward_backward(tokens: int) -> Callable[[], object]:
    """Work: the same by causal SDPA with as many key heads as query heads, as its fast path wants them."""
    shape = (1, HEADS, tokens, HEAD_DIM)
    q, k, v = (torch.randn(*shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(*shape)
    return lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), gradient
    )


def dense_pass(layout: BranchLayout, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and gradients by SDPA with the dense mask."""
    (q, k, v), gradient = inputs(layout.num_tokens, dtype, seed=1)
    q_1NTH, k_1KTH, v_1KTH = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    mixed_1NTH = F.scaled_dot_product_attention(
        q_1NTH, k_1KTH, v_1KTH, attn_mask=layout.visible(), enable_gqa=True
    )
    output = mixed_1NTH[0].transpose(0, 1)
    return output.detach(), *torch.autograd.grad(output, (q, k, v), gradient)
