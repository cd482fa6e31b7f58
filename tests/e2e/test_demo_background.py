"""The demo's second process: it works, fails aloud, and ends when the first one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_npr.demo.background import BackgroundProcess
from megatron_npr.demo.phases import Phases
from megatron_npr.demo.run import BACKGROUND, BACKGROUND_SHARES
from tests.support.patience import SECONDS


def processes_of(folder: Path) -> list[int]:
    """Numbers of the processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command:
                found.append(int(entry.name))
    return found


def wait_for_line(log: Path, text: str, seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < until, f"{text!r} is not in {log}"
        time.sleep(0.1)


def test_its_failure_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"seed": "not a number"}))
    with (
        pytest.raises(RuntimeError, match=r"(?s)the end of .*background\.log:.*invalid literal for int"),
        BackgroundProcess(
            tmp_path, Phases(tmp_path / BACKGROUND, BACKGROUND_SHARES), threads=1
        ) as background,
    ):
        background.finish()


@pytest.mark.slow
def test_leaving_early_ends_it_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 0}))
    with BackgroundProcess(
        tmp_path, Phases(tmp_path / BACKGROUND, BACKGROUND_SHARES), threads=1
    ) as background:
        wait_for_line(background.log, "stage 3: 0/148 steps")
        time.sleep(5)  # well inside a step
    assert "stopping after this step" in background.log.read_text()
    assert list((tmp_path / "sequential_rl").glob("**/step_*")), "no checkpoint"
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_it_does_not_outlive_a_demo_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 0}))
    script = (
        "import sys, time; from pathlib import Path; from megatron_npr.demo.background import BackgroundProcess; "
        "from megatron_npr.demo.phases import Phases; folder = Path(sys.argv[1]); "
        "BackgroundProcess(folder, Phases(folder / 'phases.json', {}), threads=1); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        wait_for_line(tmp_path / "background.log", "stage 3: 0/148 steps")
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until = time.monotonic() + 60
    while processes_of(tmp_path):
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.2)
