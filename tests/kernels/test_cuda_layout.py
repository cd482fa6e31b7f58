"""The CUDA sources: they compile without a warning; on a GPU the layout equals the CPU's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_ext import TagIds, branch_layout

ROOT = Path(__file__).parents[2]
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
