"""A run goes on under another layout than its checkpoint was saved at: the same losses, gradient norms and rates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import save_family

WORKER = Path(__file__).with_name("resume_worker.py")


def run(what: str, parallel: dict[str, Any], processes: int, folder: Path) -> Any:
    out = folder / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [what, json.dumps(parallel), str(folder / "model"), str(folder / "checkpoints"), str(out)]
    done = subprocess.run(
        [*command, str(WORKER), *arguments],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_dense_run_of_interleaved_stages_goes_on_elsewhere(tmp_path: Path) -> None:
    save_family("qwen3 tied", tmp_path / "model")
    expected = run("save", {"pp": 2, "vpp": 2}, 2, tmp_path)
    for processes, parallel in ((1, {}), (2, {"pp": 2}), (2, {"tp": 2}), (2, {})):
        np.testing.assert_allclose(run("load", parallel, processes, tmp_path), expected, rtol=1e-6)


@pytest.mark.slow
def test_a_run_with_experts_goes_on_with_and_without_expert_parallelism(tmp_path: Path) -> None:
    save_family("qwen3_moe", tmp_path / "model")
    expected = run("save", {"ep": 2}, 2, tmp_path)
    for processes, parallel in ((1, {}), (2, {"pp": 2}), (2, {"ep": 2})):
        np.testing.assert_allclose(run("load", parallel, processes, tmp_path), expected, rtol=1e-6)
    expected = run("save", {}, 1, tmp_path)
    np.testing.assert_allclose(run("load", {"ep": 2}, 2, tmp_path), expected, rtol=1e-6)
