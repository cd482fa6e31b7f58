"""The launch scripts on a real Slurm: a job that is started again continues its run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_npr.cli import main
from megatron_npr.demo.base import FOLDER
from megatron_npr.runtime.process_world import close_world
from tests.support.places import ROOT
from tests.support.slurm import Cluster, cluster, missing, wait_for

STEPS = 8
SIZE = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def settings(folder: Path) -> list[str]:
    given = {
        "run.dir": folder,
        "run.threads": 1,
        "model.path": FOLDER,
        "data.count": 8,
        "rollout.prompts_per_step": 3,
        "rollout.samples_per_prompt": 2,
        "rollout.max_tokens": 64,
        "rollout.kv_slots": 4096,
        "rollout.max_running_requests": 16,
        "train.steps": STEPS,
        "checkpoint.every": 1,
        "log.backend": "none",
    }
    return [f"--{name}={value}" for name, value in given.items()]


def figures(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and "memory" not in k} for line in lines]


def newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step_??????")), default=0)


def model(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_requeued_job_continues_its_run_and_loses_none(slurm: Cluster, tmp_path: Path) -> None:
    """Two jobs, one on either node: into a new folder, and told to overwrite a run. Both are requeued in the middle, which
    is what Slurm does by itself when a node fails, and end as the run that nothing happened to."""
    config = str(ROOT / "configs" / "demo" / "stage3.toml")
    quiet = tmp_path / "quiet"
    assert main(["stage3", config, *settings(quiet)]) == 0
    close_world()
    fresh, overwritten = tmp_path / "fresh", tmp_path / "overwritten"
    shutil.copytree(quiet, overwritten)
    variables = {
        "NPR_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    jobs = {}
    for folder, more in ((fresh, []), (overwritten, ["--run.overwrite", "true"])):
        options = [*SIZE, f"--output={folder}.log", f"--chdir={ROOT}"]
        script = str(ROOT / "launch" / "stage3.sh")
        jobs[folder] = slurm.submit(*options, script, config, *settings(folder), *more, **variables)
    kept: dict[Path, list[dict[str, Any]]] = {}
    while len(kept) < len(jobs):
        wait_for(
            lambda: any(
                newest(folder) in range(2, STEPS)
                for folder in jobs
                if folder not in kept and (folder / "run.json").exists()
            ),
            "a checkpoint in the middle",
        )
        for folder in [folder for folder in jobs if folder not in kept and newest(folder) in range(2, STEPS)]:
            slurm.run("scontrol", "requeue", jobs[folder])
            kept[folder] = figures(folder)[:2]
    for folder, job in jobs.items():
        slurm.wait(job, "COMPLETED")
        assert slurm.field(job, "Restarts") == "1", Path(f"{folder}.log").read_text()
        assert figures(folder)[:2] == kept[folder]
        assert figures(folder) == figures(quiet)
        assert model(folder) == model(quiet)
    assert figures(tmp_path / "overwritten.1") == figures(quiet)
    made = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert made == {"quiet", "fresh", "overwritten", "overwritten.1"}
