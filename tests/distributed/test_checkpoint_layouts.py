"""A checkpoint of one layout resumes under another with the losses of the run that was not stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.families import save_family

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def losses(folder: Path, *, processes: int, tensor: int, pipeline: int) -> list[float]:
    """The two losses after the checkpoint, in a world of its own."""
    out = folder / f"tp{tensor}_pp{pipeline}_of_{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), str(tensor), str(pipeline), str(folder), str(out)],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[float] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("family", ["qwen3 tied"])
def test_a_checkpoint_of_tp2_resumes_under_dp2(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    uninterrupted = losses(folder, processes=2, tensor=2, pipeline=1)
    resumed = losses(folder, processes=2, tensor=1, pipeline=1)
    np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-6)
    assert abs(uninterrupted[1] - uninterrupted[0]) > 1e-3, "steps that change nothing would show nothing"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3 tied", "qwen3 untied", "qwen2"])
def test_a_checkpoint_of_tp2_x_pp2_resumes_under_dp2_and_pp2(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    uninterrupted = losses(folder, processes=4, tensor=2, pipeline=2)
    for pipeline in (1, 2):
        resumed = losses(folder, processes=2, tensor=1, pipeline=pipeline)
        np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-6, err_msg=f"pp{pipeline}")
