"""vLLM's CPU build as a contender: a process of its own interpreter, stopped while it is not its turn.

Popen(vllm_worker.py) ──► ready ──► SIGSTOP ──► [SIGCONT, a line out, a line in, SIGSTOP] a batch ──► SIGCONT, end of input

Idle, vLLM's processes poll for work and burn a core for a while: a fair turn of anybody else needs them stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from megatron_npr.bench.contenders.greedy import Decoded
from npr_ext.errors import UserError

# Its folder is where the worker looks first for `import vllm`: no module here may have that name.
WORKER = Path(__file__).with_name("vllm_worker.py")
KV_CACHE_GIB = 2
OURS_ALONE = ("OMP_", "GOMP_", "KMP_", "PYTHON", "LD_PRELOAD", "VIRTUAL_ENV")
IDLE_SAMPLE_SECONDS = 0.2
STANDING = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


@dataclass(frozen=True)
class VllmSettings:
    """What the process starts with; `cores` are those that its threads are bound to, one thread each."""

    python: Path
    model: Path
    dtype: torch.dtype
    max_model_len: int
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Stillness:
    """Cores that vLLM's processes used while they waited for work, before they were stopped (median of turns), and
    CPU seconds while they were stopped (all turns of others)."""

    idle_cores: float
    stopped_cpu_seconds: float


class Vllm:
    """One vLLM engine. Use as a context manager: every process of it is gone afterwards, also where this one is killed.

    UserError where it does not start or dies; the text has the last line that it printed.
    """

    def __init__(self, settings: VllmSettings) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        about = {
            "model": str(settings.model.resolve()),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "max_model_len": settings.max_model_len,
        }
        self._python = settings.python
        try:
            self._process = subprocess.Popen(
                [str(settings.python), str(WORKER), json.dumps(about)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment(dict(os.environ), settings.cores),
                start_new_session=True,  # one signal reaches all of its processes
                text=True,
            )
        except OSError as error:
            raise UserError(f"--vllm-python {settings.python} does not start: {error}") from None
        # Stopped processes see no end of input: were this one killed, nobody would wake them. The guard's input ends with
        # this process, however that ends.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'read line; kill -s KILL -- "-$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._idle: list[float] = []
        self._stopped_cpu = 0.0
        try:
            self.version = str(self._answer()["version"])
        except BaseException:
            self.close()
            raise
        self._stop()

    @property
    def pid(self) -> int:
        """Number of its first process, whose session all others belong to."""
        return self._process.pid

    def __enter__(self) -> Vllm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """The seconds are those of `LLM.generate`, measured inside; pipe and signals are not in them."""
        self._continue()
        try:
            self._send({"prompts": [list(prompt) for prompt in prompts], "num_tokens": num_tokens})
            answer = self._answer()
        finally:
            self._stop()
        return Decoded(float(answer["seconds"]), answer["token_ids"])

    def stillness(self) -> Stillness:
        return Stillness(sorted(self._idle)[len(self._idle) // 2], self._stopped_cpu)

    def close(self) -> None:
        """Lets it end by itself, then ends what is left of it."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._signal(signal.SIGKILL)
        self._guard.kill()
        self._guard.communicate()
        self._process.stdout.close()
        self._log.close()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _answer(self) -> dict[str, Any]:
        """The next line; its other processes may hold the pipe open after it has died, so its end is watched for too."""
        out = self._process.stdout
        assert out is not None
        with (
            selectors.DefaultSelector() as selector
        ):  # not select(): it knows the first 1,024 files of a process alone
            selector.register(out, selectors.EVENT_READ)
            while not selector.select(1.0):
                if self._process.poll() is not None:
                    raise self._death()
        line = out.readline()
        if not line:
            self._process.wait()
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> UserError:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"exit code {self._process.returncode}"
        return UserError(f"vLLM of {self._python} ended: {said}")

    def _stop(self) -> None:
        before = self._cpu_seconds()
        time.sleep(IDLE_SAMPLE_SECONDS)
        self._at_stop = self._cpu_seconds()
        self._idle.append((self._at_stop - before) / IDLE_SAMPLE_SECONDS)
        self._signal(signal.SIGSTOP)
        while not all(map(_stands, self._processes())):
            time.sleep(0.001)  # a signal has arrived a moment after it was sent
        self._at_stop = self._cpu_seconds()

    def _continue(self) -> None:
        self._stopped_cpu += self._cpu_seconds() - self._at_stop
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _processes(self) -> list[psutil.Process]:
        """Those that are left, itself first; none once it has died."""
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _cpu_seconds(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(map(_cpu_seconds, self._processes()))


def _stands(process: psutil.Process) -> bool:
    """Stopped, or gone since it was listed."""
    try:
        return process.status() in STANDING
    except psutil.NoSuchProcess:
        return True


def _cpu_seconds(process: psutil.Process) -> float:
    """So far; 0 where it is gone since it was listed."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def environment(ours: dict[str, str], cores: Sequence[int]) -> dict[str, str]:
    """The process's environment: ours without what steers our own interpreter and threads, and vLLM's settings."""
    inherited = {name: value for name, value in ours.items() if not name.startswith(OURS_ALONE)}
    return inherited | {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
