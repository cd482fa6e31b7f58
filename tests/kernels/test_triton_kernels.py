"""The GPU's operators equal the CPU's: on a GPU, or in Triton's interpreter where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "triton", reason="triton is not installed: pip install '.[triton]' tests the GPU's operators"
)

WORKER = Path(__file__).with_name("triton_worker.py")


@pytest.mark.parametrize(
    "case", ["attention", "split_heads", "rows", "quantise", "categorical", "broken_rows"]
)
def test_the_gpus_operators_equal_the_cpus(case: str) -> None:
    """In a process of its own: Triton decides for its interpreter when it is imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), case],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **interpreted},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal" in done.stdout
