"""Seconds by phase, under a clock that ticks once a look."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from megatron_npr.monitoring.spans import PhaseTimes, span, timed_phases


def ticking() -> Callable[[], float]:
    ticks = count()
    return lambda: float(next(ticks))


def test_a_phase_does_not_count_the_phases_inside_it() -> None:
    with timed_phases(PhaseTimes(ticking())) as times, span("log_probs"):  # ticks 0 and 1
        with span("pack"):  # 2 to 3
            pass
        with span("pack"):  # 4 to 5
            pass
    # log_probs ends at 6, the call takes 7
    assert times.take() == (7.0, {"pack": 2.0, "log_probs": 3.0})


def test_a_step_begins_where_the_one_before_was_taken() -> None:
    with timed_phases(PhaseTimes(ticking())) as times:
        with span("rollout"):
            pass
        assert times.take() == (3.0, {"rollout": 1.0})
        with span("save"):
            pass
        assert times.take() == (3.0, {"save": 1.0})


def test_a_phase_that_raises_is_counted_and_its_surroundings_stay_right() -> None:
    with (
        timed_phases(PhaseTimes(ticking())) as times,
        span("outer"),
        pytest.raises(RuntimeError),
        span("fails"),
    ):
        raise RuntimeError
    assert times.take()[1] == {"fails": 1.0, "outer": 2.0}


def test_a_decorated_function_is_a_phase_each_time() -> None:
    @span("pack")
    def pack(rows: int) -> int:
        return rows

    with timed_phases(PhaseTimes(ticking())) as times:
        assert [pack(rows) for rows in (1, 2)] == [1, 2]
    assert times.take()[1] == {"pack": 2.0}


def test_without_anybody_who_times_a_span_is_nothing() -> None:
    times = PhaseTimes(ticking())
    with span("alone"):
        pass
    assert times.take() == (1.0, {})
