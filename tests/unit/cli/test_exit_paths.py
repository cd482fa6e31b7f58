"""How a command ends: 0 says that the work was done, and whoever stops reading what it prints changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import SECONDS

START = """
import sys, types, megatron_npr.cli as cli
from npr_ext.errors import UserError
def run(config):
{body}
    (config.run.dir.parent / 'done').write_text('')
sys.modules['megatron_npr.stages.stage3'] = types.SimpleNamespace(run=run)
sys.exit(cli.main(sys.argv[1:]))
"""
TALKS = "    for _ in range(3): print('x' * 100_000, flush=True)"
TALKS_UNFLUSHED = "    for _ in range(3): print('x')"
BREAKS_A_PIPE = """
    import os
    end, other = os.pipe()
    os.close(end)
    os.write(other, b'x')
"""
FILLS_THE_DISK = "    with open('/dev/full', 'w') as file: file.write('x')"
FILLS_IT_ON_RANK_1 = """
    from torch.distributed.checkpoint import CheckpointException
    try:
        open('/dev/full', 'w', buffering=1).write(chr(10))
    except OSError as error:
        failure = error
    raise CheckpointException('write', {1: (failure, None)})
"""
FILLS_IT_BEHIND_ANOTHER = """
    try:
        open('/dev/full', 'w', buffering=1).write(chr(10))
    except OSError as error:
        raise RuntimeError('a worker failed') from error
"""
FULL = "npr: error: cannot write to the disk: No space left on device; continue with: npr stage3"


def ended(tmp_path: Path, body: str, *, closed: str = "stdout") -> tuple[int, bool, str]:
    """(exit code, whether the work was done, what the other stream says) of a stage; nobody reads its `closed` stream."""
    words = ["stage3", "--model.path", "m", "--data.train", "demo", "--run.dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", START.format(body=body), *words]
    end, other = os.pipe()
    os.close(end)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: other}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, **streams) as process:
        os.close(other)
        said = process.communicate(timeout=SECONDS)
    return process.returncode, (tmp_path / "done").exists(), "".join(text for text in said if text)


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        (TALKS, 0, ""),
        (TALKS_UNFLUSHED, 0, ""),
        (BREAKS_A_PIPE, 1, "BrokenPipeError"),
        ("    raise BrokenPipeError", 1, "BrokenPipeError"),
        (f"{TALKS}\n    raise BrokenPipeError", 1, "BrokenPipeError"),
        (f"{TALKS}\n    raise UserError('no file')", 2, "npr: error: no file"),
        (f"{TALKS}\n    raise KeyboardInterrupt", 130, "npr: interrupted; continue with"),
        (f"{TALKS}\n    raise RuntimeError('ours')", 1, "RuntimeError: ours"),
        (FILLS_THE_DISK, 2, FULL),
        (FILLS_IT_ON_RANK_1, 2, FULL),
        (FILLS_IT_BEHIND_ANOTHER, 2, FULL),
        (
            "    raise OSError(30, 'Read-only file system', 'a/b')",
            2,
            "cannot write to a/b: Read-only file system",
        ),
        ("    raise OSError(5, 'Input/output error', 'a/b')", 1, "OSError: [Errno 5]"),
        ("    raise MemoryError", 1, "MemoryError"),
        ("    raise ConnectionResetError", 1, "ConnectionResetError"),
        ("    sys.exit(3)", 3, ""),
    ],
)
def test_the_exit_code_is_0_only_when_the_work_was_done(
    tmp_path: Path, body: str, code: int, last: str
) -> None:
    found, done, said = ended(tmp_path, body)
    assert (found, done) == (code, code == 0), said
    assert last in (said.splitlines() or [""])[-1]


def test_nor_does_a_reader_of_the_progress_that_goes_away_end_the_work(tmp_path: Path) -> None:
    body = "    for _ in range(3): print('x' * 100_000, file=sys.stderr, flush=True)"
    assert ended(tmp_path, body, closed="stderr") == (0, True, "")


def test_help_into_a_closed_pipe_is_quiet() -> None:
    end, other = os.pipe()
    os.close(end)
    command = [sys.executable, "-m", "megatron_npr", "stage3", "--help"]
    done = subprocess.run(command, stdout=other, stderr=subprocess.PIPE, check=False)
    os.close(other)
    assert (done.returncode, done.stderr) == (0, b"")
