"""Ctrl-C and SIGTERM between steps: the current step ends, a checkpoint is written, then KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Set by a signal on any rank, seen by all ranks after the same step."""

    def __init__(self) -> None:
        self._received = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; a second signal interrupts at once."""
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        print("stopping after this step (once more: stop now, losing it)", file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """True on every rank when any rank was asked to stop; collective."""
        flag = torch.tensor([int(self._received)])
        if dist.get_world_size() > 1:
            flag = flag.to("cuda") if dist.get_backend() == "nccl" else flag
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM for the length of a with-block (in the main thread; elsewhere signals stay as they are)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
