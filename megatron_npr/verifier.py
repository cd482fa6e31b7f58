"""Is an answer right? math-verify decides, in worker processes of its own, with a time-out that kills.

(answer, gold) ──► cache ──► equal text, whole numbers ──► worker process: math-verify ──► bool
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeAlias

_WHOLE_NUMBERS = re.compile(r"0|-?[1-9]\d*|\((?:0|[1-9]\d*)(?:,(?:0|[1-9]\d*))+\)")


Claim: TypeAlias = tuple[str | None, str]
"""An answer (None: none was given) and what it should be, both LaTeX without `\\boxed`."""


class Verifier:
    """Compares answers. `correct` for one, `correct_all` for many at once on `num_workers` processes.

    With `compare_whole_numbers` two plain whole numbers, or two tuples of them, are compared by their digits
    (math-verify agrees, tests show, but takes 10 ms to parse a tuple); without it only equal texts are
    decided here.
    """

    def __init__(
        self, num_workers: int = 2, *, timeout_seconds: float = 10.0, compare_whole_numbers: bool = True
    ) -> None:
        self.num_timeouts = 0
        self._timeout = timeout_seconds
        self._compare_whole_numbers = compare_whole_numbers
        self._verdicts: dict[Claim, bool] = {}
        self._threads = ThreadPoolExecutor(num_workers)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(_Worker())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().stop()

    def correct(self, answer: str | None, gold: str) -> bool:
        """Whether the answer equals the gold one; None does not, nor one that takes too long."""
        return self.correct_all([(answer, gold)])[0]

    def correct_all(self, claims: Sequence[Claim]) -> list[bool]:
        """`correct` of every claim, each different one decided once."""
        open_claims = [claim for claim in dict.fromkeys(claims) if not self._decide(claim)]
        for claim, verdict in zip(open_claims, self._threads.map(self._ask, open_claims), strict=True):
            self._verdicts[claim] = verdict
        return [self._verdicts[claim] for claim in claims]

    def _decide(self, claim: Claim) -> bool:
        """Files the verdict where it needs no algebra; False where it does."""
        if claim in self._verdicts:
            return True
        answer, gold = (text.strip() if text else "" for text in claim)
        if not answer or answer == gold:
            self._verdicts[claim] = bool(answer)
            return True
        if self._compare_whole_numbers and all(_WHOLE_NUMBERS.fullmatch(text) for text in (answer, gold)):
            self._verdicts[claim] = False
            return True
        return False

    def _ask(self, claim: Claim) -> bool:
        worker = self._idle.get()
        try:
            verdict = worker.ask(claim, self._timeout)
        finally:
            self._idle.put(worker)
        if verdict is None:
            self.num_timeouts += 1
        return bool(verdict)


class _Worker:
    """A process that runs `megatron_npr.verifier_worker`; started when first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, claim: Claim, timeout: float) -> bool | None:
        """The worker's verdict; None when it took longer than `timeout` seconds or died of the answer."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(claim).encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(timeout) else b""
        if not line:
            self.stop()
            return None
        return bool(json.loads(line))

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megatron_npr.verifier_worker"]
        # A session of its own: Ctrl-C in a terminal is for us alone, a worker ends with its input.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        if not ready:
            raise RuntimeError(f"the verifier process ended at once with exit code {self._process.wait()}")
        return self._process
