"""What a GPU does with layouts and branch attention.

standard layouts ─► layout and block lists (us, waits) ─► FlexAttention: branches against dense causal (TFLOP/s)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_npr.bench.gpu.result import AttentionFigures, LayoutFigures
from megatron_npr.bench.gpu.timing import median_seconds, waits
from npr_ext import BranchLayout, branch_attention, branch_layout
from npr_ext.testing import RandomLayout, random_layout


@dataclass(frozen=True)
class Shape:
    """Attention of Qwen3-4B at a length: 32 query and 8 key heads of 128."""

    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def flops(self, pairs: int) -> int:
        """FLOPs of forward (two products a pair) and backward (five)."""
        return 14 * pairs * self.heads * self.head_dim


FULL = (8192, 32_768)
TINY = Shape(1024, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32)


def measure_layout(device: torch.device, *, tiny: bool) -> LayoutFigures:
    """64 x 32k tokens."""
    return layout_figures(device, *((2, 1024) if tiny else (64, 1 << 15)))


def measure_attention(device: torch.device, *, tiny: bool) -> dict[str, AttentionFigures]:
    """By length."""
    shapes = (TINY,) if tiny else tuple(Shape(tokens) for tokens in FULL)
    return {str(shape.tokens): attention_figures(device, shape) for shape in shapes}


def layout_figures(device: torch.device, sequences: int, length: int) -> LayoutFigures:
    """Time of a packed batch, of the block lists of one row, and what either waited for."""
    lay_out = packed(random_layout(0, length), sequences, device)
    one = packed(random_layout(0, length), 1, device)()
    return LayoutFigures(
        sequences=sequences,
        tokens=sequences * length,
        layout_us=1e6 * median_seconds(lay_out, device),
        block_mask_us=1e6 * median_seconds(one.block_mask, device),
        waits=waits(lambda: lay_out() and one.block_mask(), device),
    )


def attention_figures(device: torch.device, shape: Shape) -> AttentionFigures:
    """TFLOP/s of forward and backward on the visible pairs, of branches and of a dense causal row, same kernel."""
    sample = random_layout(0, shape.tokens)
    layouts = [sample.layout(branching=branching) for branching in (True, False)]
    seconds = [median_seconds(forward_backward(layout, shape, device), device) for layout in layouts]
    rates = [
        1e-12 * shape.flops(layout.visible_pairs()) / each
        for layout, each in zip(layouts, seconds, strict=True)
    ]
    return AttentionFigures(
        density=layouts[0].density(),
        branching_ms=1e3 * seconds[0],
        causal_ms=1e3 * seconds[1],
        branching_tflops=rates[0],
        causal_tflops=rates[1],
        branching_over_causal=rates[0] / rates[1],
    )


def packed(sample: RandomLayout, sequences: int, device: torch.device) -> Callable[[], BranchLayout]:
    """Lays out copies of a sample in one row."""
    length = len(sample.token_ids)
    return functools.partial(
        branch_layout,
        sample.token_ids.repeat(sequences).to(device),
        tags=sample.tags,
        prompt_lengths=torch.full((sequences,), sample.prompt_length, device=device),
        cu_seqlens=torch.arange(sequences + 1, device=device) * length,
    )


def forward_backward(
    layout: BranchLayout, shape: Shape, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """Work: the gradients of q, k and v."""
    on_device = BranchLayout.from_tensor(layout.as_tensor().to(device))
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    *qkv, gradient = (
        torch.randn(shape.tokens, count, shape.head_dim, generator=generator).to(device, shape.dtype)
        for count in heads
    )
    q, k, v = (tensor.requires_grad_() for tensor in qkv)
    return lambda: torch.autograd.grad(branch_attention(q, k, v, on_device), (q, k, v), gradient)
