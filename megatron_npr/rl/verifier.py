"""Is an answer right? math-verify decides, in worker processes of its own, with a time-out that kills.

(answer, gold) ──► cache ──► equal text, whole numbers, far too long ──► worker process: math-verify ──► Verdict
"""

from __future__ import annotations

import contextlib
import json
import re
import selectors
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeAlias

MOST_CHARACTERS = 4096
"""That an answer may be longer than the gold one: math-verify reads 10,000 letters in 3 s, and the text is a model's."""

REMEMBERED = 1 << 14
"""Claims whose verdicts are kept; in the worst case, all as long as they may be, 130 MB."""

_WHOLE_NUMBERS = re.compile(r"0|-?[1-9]\d*|\((?:0|[1-9]\d*)(?:,(?:0|[1-9]\d*))+\)")


Claim: TypeAlias = tuple[str | None, str]
"""An answer (None: none was given) and what it should be, both LaTeX without `\\boxed`."""


class Verdict(IntEnum):
    """What became of a claim. An answer that was not decided in time, or killed its worker twice, does not count as right."""

    WRONG = 0
    RIGHT = 1
    TIMED_OUT = 2
    DIED = 3


class WorkerDiedError(RuntimeError):
    """A worker process ended before it answered."""


class Verifier:
    """Compares answers. `correct` for one, `judge` for many at once on `num_workers` processes.

    With `compare_whole_numbers` two plain whole numbers, or two tuples of them, are compared by their digits
    (math-verify agrees, tests show, but takes 10 ms to parse a tuple); without it only equal texts are decided here.
    """

    def __init__(
        self, num_workers: int = 2, *, timeout_seconds: float = 10.0, compare_whole_numbers: bool = True
    ) -> None:
        self._timeout = timeout_seconds
        self._compare_whole_numbers = compare_whole_numbers
        self._remembered: OrderedDict[Claim, Verdict] = OrderedDict()  # the latest asked for last
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
        """Whether the answer equals the gold one; None does not, nor one that was not decided."""
        return self.judge([(answer, gold)])[0] is Verdict.RIGHT

    def judge(self, claims: Sequence[Claim]) -> list[Verdict]:
        """The verdict on every claim, each different one decided once."""
        different = dict.fromkeys(claims)
        decided = {claim: verdict for claim in different if (verdict := self._decide(claim)) is not None}
        open_claims = [claim for claim in different if claim not in decided]
        asked = dict(zip(open_claims, self._threads.map(self._ask, open_claims), strict=True))
        self._remembered |= asked
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        verdicts = decided | asked
        return [verdicts[claim] for claim in claims]

    def _decide(self, claim: Claim) -> Verdict | None:
        """The verdict where it is known or needs no algebra."""
        if claim in self._remembered:
            self._remembered.move_to_end(claim)
            return self._remembered[claim]
        answer, gold = (text.strip() if text else "" for text in claim)
        if not answer or answer == gold:
            return Verdict(bool(answer))
        whole_numbers = self._compare_whole_numbers and all(map(_WHOLE_NUMBERS.fullmatch, (answer, gold)))
        if whole_numbers or len(answer) > len(gold) + MOST_CHARACTERS:
            return Verdict.WRONG
        return None

    def _ask(self, claim: Claim) -> Verdict:
        """A worker's verdict. One that dies is replaced and asked once more: another process may have taken its memory, or the
        answer itself may be deadly."""
        worker = self._idle.get()
        try:
            try:
                return worker.ask(claim, self._timeout)
            except WorkerDiedError:
                return worker.ask(claim, self._timeout)
        except WorkerDiedError:
            return Verdict.DIED
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that runs `megatron_npr.rl.verifier_worker`; started when asked while there is none."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, claim: Claim, timeout: float) -> Verdict:
        """The worker's verdict within `timeout` seconds; WorkerDiedError where it ended instead.

        After that, as after a time-out, it is gone.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(claim).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            raise WorkerDiedError from None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.stop()
                return Verdict.TIMED_OUT
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            self.stop()
            raise WorkerDiedError
        return Verdict(bool(json.loads(line)))

    def stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it has not read
            process.stdin.close()
        process.stdout.close()
        process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megatron_npr.rl.verifier_worker"]
        # A session of its own: Ctrl-C in a terminal is for us alone, a worker ends with its input.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._process = process
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            code = process.wait()
            self.stop()
            if code < 0:  # killed, there is nothing wrong with it
                raise WorkerDiedError
            raise RuntimeError(f"the verifier process ended at once with exit code {code}")
        return process
