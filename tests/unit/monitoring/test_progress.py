import io
from collections.abc import Iterator

from megatron_npr.monitoring.progress import PLAIN_LINES, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(seconds: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += seconds


def test_without_a_terminal_a_few_plain_lines_appear() -> None:
    stream, clock = io.StringIO(), ticking(1.0)
    with Progress("stage 3", 100, stream=stream, clock=lambda: next(clock)) as progress:
        for _ in range(100):
            progress.advance(tokens=50, reward=0.5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == PLAIN_LINES + 1
    assert lines[0] == "stage 3: 0/100 steps"
    assert lines[-1].startswith("stage 3: 100/100 steps")
    assert lines[-1].endswith("reward 0.5")
    assert "\x1b" not in stream.getvalue()


def test_without_a_terminal_a_slow_machine_is_not_silent_for_longer_than_a_minute() -> None:
    stream, clock = io.StringIO(), ticking(40.0)
    with Progress("stage 3", 100, stream=stream, clock=lambda: next(clock)) as progress:
        for _ in range(10):
            progress.advance(tokens=50)
    assert stream.getvalue().splitlines()[1].startswith("stage 3: 2/100 steps  1:20 gone, 1:05:20 left")


def test_throughput_is_that_of_the_last_steps() -> None:
    times = iter([0.0, 10.0, 20.0])
    progress = Progress("x", 2, stream=io.StringIO(), shown=False, clock=lambda: next(times))
    progress.advance(tokens=100)
    progress.advance(tokens=300)
    assert progress.tokens_per_second == 20.0


def test_a_terminal_shows_a_bar_with_count_and_remaining_time() -> None:
    stream = Terminal()
    with Progress("stage 1", 4, stream=stream, first=2) as progress:
        progress.advance(tokens=10)
        progress.advance(tokens=10)
    assert "4/4" in stream.getvalue()
    assert "left" in stream.getvalue()


def test_hidden_progress_prints_nothing() -> None:
    stream = io.StringIO()
    with Progress("x", 3, stream=stream, shown=False) as progress:
        progress.advance()
    assert stream.getvalue() == ""
