"""Progress of a stage for whoever watches: a bar in a terminal, a few plain lines anywhere else.

with Progress("stage 3", total=40, unit="steps", shown=world.is_main and config.log.progress) as progress:
    progress.advance(tokens=18_230, reward=0.4)   # a step is done
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

PLAIN_LINES = 5
PLAIN_SECONDS = 60.0
"""Without a terminal: so many lines over a stage, and never longer than this without one (when steps end)."""

RATE_WINDOW = 10


class Progress:
    """Steps done, tokens per second over the last steps, remaining time, and the numbers of the last step."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "steps",
        *,
        first: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, first
        self._first, self._clock, self._began = first, clock, clock()
        self._window: deque[tuple[float, int]] = deque([(self._began, 0)], maxlen=RATE_WINDOW + 1)
        self._tokens = 0
        self._stream = stream or sys.stderr
        self._numbers = ""
        self._printed = self._began
        self._plain = shown and not self._stream.isatty()
        self._bar = _bar(self._stream) if shown and not self._plain else None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, note="")
        elif self._plain:
            self._print(f"{self.name}: {self.done}/{self.total} {self.unit}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps; 0 before the first."""
        (since, before), (now, after) = self._window[0], self._window[-1]
        return (after - before) / (now - since) if now > since else 0.0

    def advance(self, steps: int = 1, *, tokens: int = 0, **numbers: float) -> None:
        """`steps` more are done; they took `tokens` tokens and ended with these numbers."""
        before, self.done = self.done, self.done + steps
        self._tokens += tokens
        now = self._clock()
        self._window.append((now, self._tokens))
        rate = f"{self.tokens_per_second:,.0f} tok/s  " if self._tokens else ""
        self._numbers = rate + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self._numbers)
        elif self._plain and self._is_due(before, now):
            self._printed, elapsed = now, now - self._began
            left = elapsed / max(1, self.done - self._first) * (self.total - self.done)
            self._print(
                f"{self.name}: {self.done}/{self.total} {self.unit}  {duration(elapsed)} gone, "
                f"{duration(left)} left  {self._numbers}"
            )

    def warn(self, line: str) -> None:
        """Say that something is not as usual; also where no progress is shown."""
        if self._bar is not None:
            self._bar.console.print(f"npr: warning: {line}", markup=False, highlight=False)
        else:
            self._print(f"npr: warning: {line}")

    def _is_due(self, before: int, now: float) -> bool:
        return (
            self.done >= self.total
            or before * PLAIN_LINES // self.total != self.done * PLAIN_LINES // self.total
            or now - self._printed >= PLAIN_SECONDS
        )

    def _print(self, line: str) -> None:
        print(line.rstrip(), file=self._stream, flush=True)


def _bar(stream: TextIO) -> RichProgress:
    return RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(file=stream),
    )


def duration(seconds: float) -> str:
    """Whole seconds as a clock shows them: 4:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
