"""The CUDA sources: they compile without a warning; on a GPU layouts, block lists and attention equal the CPU's."""

import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_npr.bench.gpu.layout import packed
from megatron_npr.bench.gpu.timing import waits
from npr_ext import BranchLayout, TagIds, branch_attention, branch_layout
from npr_ext.layout.reference import reference_attention
from npr_ext.layout.shard import shard_of
from npr_ext.testing import random_layout
from tests.support.places import ROOT

TAGS = TagIds(*range(1, 9))


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed: CUDA sources are not compiled"
)
def test_every_cuda_source_compiles_without_a_warning() -> None:
    command = [sys.executable, str(ROOT / "cuda_ext/cuda_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registers" in done.stdout


@pytest.mark.gpu
@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_the_gpu_lays_out_any_tokens_as_the_cpu_does(
    segments: list[tuple[int, int]], seed: int, well_bounded: bool, branching: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length for length, _ in segments])
    total = int(lengths.sum())
    # Tags in a likely order, so that whole blocks occur beside broken ones.
    walk = torch.tensor([0, 1, 3, 4, 3, 4, 2, 0, 5, 6, 5, 6, 7, 8]).repeat(total // 14 + 1)[:total]
    noise = torch.randint(0, 30, (total,), generator=generator)
    tokens = torch.where(torch.rand(total, generator=generator) < 0.9, walk, noise).to(dtype)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    prompts = torch.tensor([min(length, prompt) for length, prompt in segments])
    if not well_bounded:
        bounds = bounds + torch.randint(-50, 50, bounds.shape, generator=generator)
    parents = torch.randint(-1, len(segments), (len(segments),), generator=generator)
    arguments = {"prompt_lengths": prompts, "cu_seqlens": bounds, "parents": parents}
    expected = branch_layout(tokens, tags=TAGS, branching=branching, **arguments)
    on_gpu = {name: tensor.cuda() for name, tensor in arguments.items()}
    actual = branch_layout(tokens.cuda(), tags=TAGS, branching=branching, **on_gpu)
    assert torch.equal(actual.as_tensor().cpu(), expected.as_tensor())
    assert torch.equal(actual.branch_ids.cpu(), expected.branch_ids)
    assert torch.equal(actual.status.cpu(), expected.status)


@pytest.mark.gpu
@settings(max_examples=100, deadline=None)
@given(st.integers(120, 4000), st.integers(0, 10**6), st.sampled_from([16, 64, 128]), st.booleans())
def test_the_gpu_lists_the_blocks_that_the_cpu_lists(
    tokens: int, seed: int, block: int, second_half: bool
) -> None:
    row = random_layout(seed, tokens, 1, 3, 0.5).layout()
    layout = shard_of(row, tokens // 2, tokens).layout if second_half else row
    on_gpu = BranchLayout(layout.as_tensor().cuda(), first_query=layout.first_query)
    lists = (
        torch.ops.npr.block_lists(each.as_tensor(), block, each.first_query) for each in (layout, on_gpu)
    )
    for expected, actual in zip(*lists, strict=True):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(700, torch.float32), (1024, torch.float32), (3000, torch.bfloat16)]
)
def test_attention_on_the_gpu_is_the_reference(tokens: int, dtype: torch.dtype) -> None:
    layout = random_layout(1, tokens, 2, 3, 0.6).layout()
    on_gpu = BranchLayout.from_tensor(layout.as_tensor().cuda())
    generator = torch.Generator().manual_seed(0)
    *qkv, weight = (torch.randn(tokens, heads, 64, generator=generator) for heads in (8, 2, 2, 8))
    exact = [tensor.double().requires_grad_() for tensor in qkv]
    output = reference_attention(*exact, layout.visible(), 0.125)
    expected = (output, *torch.autograd.grad(output, exact, weight.double()))
    ours = [tensor.to("cuda", dtype).requires_grad_() for tensor in qkv]
    output = branch_attention(*ours, on_gpu)
    actual = (output, *torch.autograd.grad(output, ours, weight.to("cuda", dtype)))
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    for mine, theirs in zip(actual, expected, strict=True):
        largest = float(theirs.abs().max())
        assert float((mine.cpu().double() - theirs).abs().max()) <= tolerance * max(largest, 1.0)


@pytest.mark.gpu
def test_the_host_waits_for_nothing_while_it_lays_out() -> None:
    device = torch.device("cuda")
    lay_out = packed(random_layout(0, 4096), 8, device)
    lay_out().block_mask()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lay_out().block_mask()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits(lambda: lay_out().block_mask(), device) == []
