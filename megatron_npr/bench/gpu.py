"""`make gpu`: what a GPU does with layouts and branch attention; writes tests/bench/results/<device>.json.

    standard layouts ─► layout and block lists (us, synchronisations) ─► FlexAttention: branches against dense causal (TFLOP/s)

Needs torch and npr_ext only, so that it runs with the Python that a GPU machine brings. The same functions take a CPU and small
sizes in the tests; figures count on a GPU alone.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from npr_ext import BranchLayout, branch_attention, branch_layout
from npr_ext.testing import RandomLayout, random_layout

RESULTS = Path(__file__).parents[2] / "tests" / "bench" / "results"
WAITING = re.compile(r"cudaStreamSynchronize|cudaDeviceSynchronize|cudaEventSynchronize|Memcpy DtoH")


@dataclass(frozen=True)
class Shape:
    """Attention of Qwen3-4B at a length: 32 query and 8 key heads of 128."""

    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def flops(self, pairs: int) -> int:
        """Of forward (two products a pair) and backward (five)."""
        return 14 * pairs * self.heads * self.head_dim


def measure(
    device: torch.device, *, sequences: int = 64, length: int = 1 << 15, shapes: tuple[Shape, ...]
) -> dict[str, object]:
    """All figures on one device."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "layout": layout_figures(device, sequences, length),
        "attention": {shape.tokens: attention_figures(device, shape) for shape in shapes},
    }


def layout_figures(device: torch.device, sequences: int, length: int) -> dict[str, object]:
    """Time of a packed batch, of the block lists of one row, and what either waited for."""
    lay_out = packed(random_layout(0, length), sequences, device)
    one = packed(random_layout(0, length), 1, device)()
    return {
        "sequences": sequences,
        "tokens": sequences * length,
        "layout_us": 1e6 * median_seconds(lay_out, device),
        "block_mask_us": 1e6 * median_seconds(one.block_mask, device),
        "synchronisations": waits(lambda: lay_out() and one.block_mask(), device),
    }


def attention_figures(device: torch.device, shape: Shape) -> dict[str, float]:
    """TFLOP/s of forward and backward on the visible pairs, of branches and of a dense causal row, same kernel."""
    sample = random_layout(0, shape.tokens)
    branching, causal = (sample.layout(branching=branching) for branching in (True, False))
    rates = {}
    for name, layout in (("branching", branching), ("causal", causal)):
        seconds = median_seconds(forward_backward(layout, shape, device), device)
        rates[name] = 1e-12 * shape.flops(layout.visible_pairs()) / seconds
        rates[f"{name}_ms"] = 1e3 * seconds
    return {
        **rates,
        "density": branching.density(),
        "branching_over_causal": rates["branching"] / rates["causal"],
    }


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


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median of single runs after three that warm up; each waits for the device."""
    seconds = []
    for run in range(repeats + 3):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        if run >= 3:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def waits(work: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the calls in which the host waited for the device, as the profiler saw them; none is the aim."""
    if device.type != "cuda":
        return []
    work()
    _synchronize(device)
    with torch.profiler.profile() as profiler:
        work()
    return sorted({event.name for event in profiler.events() if WAITING.search(event.name)})


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Exit code 2 where there is no GPU."""
    if not torch.cuda.is_available():
        print(
            "gpu bench: no CUDA device is visible to torch: run it on a machine with a GPU", file=sys.stderr
        )
        return 2
    figures = measure(torch.device("cuda"), shapes=tuple(Shape(1 << size) for size in (13, 15)))
    figures["shape"] = {name: str(value) for name, value in asdict(Shape(0)).items() if name != "tokens"}
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(figures["device"]).lower())
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
