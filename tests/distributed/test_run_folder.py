"""What becomes of a used folder is decided by the first rank, for all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npr.demo.base import FOLDER
from tests.support.launch import ONE_MACHINE, worker_environment
from tests.support.patience import SECONDS


@pytest.mark.slow
def test_a_used_folder_is_refused_on_every_rank_in_one_line(tmp_path: Path) -> None:
    """No rank waits for the one that refuses: the job ends at once."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    words = [
        *ONE_MACHINE,
        "--nproc-per-node=2",
        f"--log-dir={tmp_path / 'logs'}",
        "-m",
        "megatron_npr",
        "stage3",
    ]
    words += ["--model.path", str(FOLDER), "--model.dtype", "fp32", "--data.train", "demo"]
    words += ["--run.dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True,
        text=True,
        check=False,
        env=worker_environment(),
        timeout=SECONDS,
    )
    assert done.returncode == 1
    assert (
        done.stderr.count(f"npr: error: {tmp_path} holds a run of an unknown command (step 1, without") == 1
    )
    assert done.stderr.count("exitcode  : 2") >= 1
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
