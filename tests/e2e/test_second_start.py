"""A second start in a used folder, with real runs: it loses nothing, and what it continues ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npr.cli import main
from megatron_npr.demo.base import FOLDER
from megatron_npr.runtime.process_world import close_world
from tests.support.places import CONFIGS

DEMO = CONFIGS / "demo"
COMMANDS = ("stage1", "sample", "stage2", "stage3", "eval")
OF_A_START = {"config.toml", "run.json", "run.lock"}

SHORT = [
    "--model.path",
    str(FOLDER),
    "--run.threads",
    "1",
    "--log.backend",
    "none",
    "--log.progress",
    "false",
]
ROLLOUT = ["--rollout.max_tokens", "64", "--rollout.kv_slots", "1024", "--rollout.max_running_requests", "16"]
RL = [*ROLLOUT, "--rollout.prompts_per_step", "3", "--rollout.samples_per_prompt", "2", "--data.count", "8"]
STEPS = ["--train.steps", "2", "--checkpoint.every", "1", "--checkpoint.keep", "2"]
OWN = {
    "stage1": [*RL, *STEPS, "--train.updates_per_step", "1"],
    "sample": [
        "--rollout.prompts_per_step",
        "5",
        "--rollout.max_tokens",
        "320",
        "--data.count",
        "12",
        "--sample.target",
        "none",
    ],
    "stage2": [*STEPS, "--train.global_batch", "2"],
    "stage3": [*RL, *STEPS],
    "eval": [
        *ROLLOUT,
        "--eval.count",
        "3",
        "--eval.samples_per_problem",
        "2",
        "--eval.modes",
        "sequential,unforced",
        "--rollout.prompts_per_step",
        "2",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def left_world() -> Iterator[None]:
    yield
    close_world()


def words(command: str, folder: Path, samples: Path, *overrides: str) -> list[str]:
    data = ["--sft.data", str(samples)] if command == "stage2" else []
    given = ["--run.dir", str(folder), *SHORT, *OWN[command], *data, *overrides]
    return [command, str(DEMO / f"{command}.toml"), *given]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in OF_A_START)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def outcome(folder: Path) -> dict[str, object]:
    """What a run has made, without what only measures time or memory."""
    made: dict[str, object] = {}
    for name, content in contents(folder).items():
        if name.startswith("model/") or name == "samples.jsonl":
            made[name] = content
        elif name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            made[name] = [
                {k: v for k, v in line.items() if "seconds" not in k and "memory" not in k} for line in lines
            ]
        elif name == "rollouts.jsonl":  # which count the steps of the engine since it was made
            made[name] = [{**json.loads(line), "decode_steps": None} for line in content.splitlines()]
        elif name == "eval.json":
            made[name] = re.sub(rb'"tokens_per_second": [^,]*', b"", content)
    return made


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled") / "run"
    assert main(words("sample", folder, folder)) == 0
    return folder / "samples.jsonl"


@pytest.fixture(scope="module", params=COMMANDS)
def done(
    request: pytest.FixtureRequest, samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """(command, folder of its finished run)."""
    command = str(request.param)
    folder = samples.parent if command == "sample" else tmp_path_factory.mktemp(command) / "run"
    if command != "sample":
        assert main(words(command, folder, samples)) == 0
    return command, folder


def test_a_second_start_in_a_used_folder_loses_nothing(
    done: tuple[str, Path], samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, folder = done
    before = contents(folder)
    assert before
    assert main(words(command, folder, samples)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"npr: error: {folder} holds a run of {command}" in line
    assert "--run.resume true" in line and "--run.overwrite true" in line
    assert contents(folder) == before


def cut_back(command: str, folder: Path) -> None:
    """As a crash in the middle of the second step or round leaves the folder."""
    (folder / "eval.json").unlink(missing_ok=True)
    (folder / "samples.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    if command in ("sample", "eval"):
        first, second, *_ = (folder / "progress.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "progress.jsonl").write_bytes(first + second[: len(second) // 2])
    else:
        shutil.rmtree(folder / "checkpoints" / "step_000002")
        (folder / "checkpoints" / "step_000002.writing").mkdir()
        (folder / "checkpoints" / "latest").write_text("step_000001\n")


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    done: tuple[str, Path], samples: Path, tmp_path: Path
) -> None:
    command, folder = done
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    cut_back(command, again)
    assert outcome(again) != outcome(folder)
    assert main(words(command, again, samples, "--run.resume", "auto")) == 0
    assert outcome(again) == outcome(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def interrupted(folder: Path, given: list[str]) -> list[str]:
    """The lines of progress.jsonl after a process of its own that is interrupted as soon as the first round is done."""
    command = [sys.executable, "-m", "megatron_npr", *given]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    with process:
        while process.poll() is None and not (folder / "progress.jsonl").is_file():
            time.sleep(0.02)
        while process.poll() is None and not (folder / "progress.jsonl").read_bytes():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert "--run.resume auto" in said
    return (folder / "progress.jsonl").read_text().splitlines()


def test_sampling_keeps_what_it_has_on_ctrl_c_and_continues(samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rounds = interrupted(folder, words("sample", folder, samples, "--rollout.prompts_per_step", "1"))
    assert 1 <= len(rounds) < 12, "it stopped in the middle"
    has = (folder / "samples.jsonl").read_text().splitlines()
    assert len(has) == sum(len(json.loads(line)["kept"]) for line in rounds)
    assert main(words("sample", folder, samples, "--run.resume", "true")) == 0
    assert (folder / "samples.jsonl").read_bytes() == samples.read_bytes()
    assert (folder / "progress.jsonl").read_text().splitlines()[: len(rounds)] == rounds, (
        "nothing was sampled again"
    )


def test_an_evaluation_keeps_what_it_has_on_ctrl_c_and_continues(tmp_path: Path) -> None:
    """Rounds of one problem, six in all; the truth is the same evaluation, never interrupted."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    one_a_round = ["--rollout.prompts_per_step", "1"]
    rounds = interrupted(folder, words("eval", folder, folder, *one_a_round))
    assert 1 <= len(rounds) < 6, "it stopped in the middle"
    assert not (folder / "eval.json").exists()
    for place, start in ((folder, ["--run.resume", "true"]), (whole, [])):
        assert main(words("eval", place, place, *one_a_round, *start)) == 0
    assert (folder / "progress.jsonl").read_text().splitlines()[: len(rounds)] == rounds, (
        "nothing was sampled again"
    )
    assert outcome(folder) == outcome(whole)
    assert len((folder / "rollouts.jsonl").read_bytes().splitlines()) == 3 * 2
