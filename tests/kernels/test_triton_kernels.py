"""The GPU's operators equal the CPU's: on a GPU, or in Triton's interpreter where there is none."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.places import ROOT

pytest.importorskip(
    "triton", reason="triton is not installed: pip install '.[triton]' tests the GPU's operators"
)


@pytest.mark.parametrize(
    "case", ["attention", "split_heads", "rows", "quantize_rows", "quantize", "categorical", "broken_rows"]
)
def test_the_gpus_operators_equal_the_cpus(case: str) -> None:
    assert "equal" in output_of("operators", case)


def test_the_engine_on_the_gpus_operators_samples_what_the_cpu_samples() -> None:
    """Forks, joins and preemption, every step padded to its bucket; on a GPU see test_cuda_engine.py."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    assert "equal" in output_of("engine")


@pytest.mark.slow
def test_the_gpus_operators_compile_for_a_gpu_that_is_not_there() -> None:
    """At Qwen3-4B's shape, for sm_90; what a block takes of shared memory is there."""
    assert "compiled" in output_of("compile", interpret=False)


def output_of(worker: str, *words: str, interpret: bool = True) -> str:
    """In a process of its own: Triton decides for its interpreter when it is imported."""
    interpreted = {"TRITON_INTERPRET": "1"} if interpret and not torch.cuda.is_available() else {}
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.workers.{worker}", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **interpreted, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
