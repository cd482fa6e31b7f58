"""`npr serve` as a user starts it, ends it, and gets it wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron_npr.cli import main
from tests.support.patience import SECONDS
from tests.unit.server.conftest import FOLDER


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "megatron_npr", "serve", str(FOLDER), "--port", "0", "--threads", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_in_flight_end_and_exits_0(
    number: signal.Signals, process: subprocess.Popen[str]
) -> None:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("serving demo_base at http://127.0.0.1:"), process.stderr.read()
    url = line.split()[3]
    body = {"prompt": "Sort by cost: pen=59*6", "max_tokens": 400, "stream": True, "temperature": 2}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=SECONDS) as response:
        lines = response.iter_lines()
        first = next(lines)
        process.send_signal(number)
        rest = [line for line in lines if line]
    assert json.loads(first.removeprefix("data: "))["choices"]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    assert process.wait(timeout=SECONDS) == 0
    assert process.stdout.read() == process.stderr.read() == ""


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        text = failure(["no-such-folder", "--port", port], capsys)
    assert f"cannot serve at 127.0.0.1:{port}: Address already in use" in text


@pytest.mark.parametrize(
    "words, text",
    [
        (["no-such-folder", "--port", "0"], "model folder no-such-folder does not exist"),
        ([], "the following arguments are required: model"),
        (["m", "--port", "65536"], "--port is 65536"),
        (["m", "--max-tokens", "0"], "--max-tokens is 0"),
        (["m", "--max-in-flight", "0"], "--max-in-flight is 0"),
        (["m", "--dtype", "fp8"], "--dtype"),
        (["m", "--api-key", ""], "the API key is empty"),
        (["m", "--host", "::2", "--port", "0"], "cannot serve at ::2:0"),
    ],
)
def test_mistakes_are_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in failure(words, capsys)


def test_the_key_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("NPR_API_KEY", " ")
    assert "the API key is empty" in failure([str(tmp_path)], capsys)
