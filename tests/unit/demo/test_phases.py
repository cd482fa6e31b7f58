"""Phases of the demo: done once, seen by the other process, and timed as a clock on the wall would."""

from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.demo.phases import Phases, covered


def test_a_finished_phase_is_not_done_again_and_a_failed_one_is(tmp_path: Path) -> None:
    done: list[str] = []

    def fail() -> None:
        raise ValueError("on purpose")

    phases = Phases(tmp_path / "phases.json")
    phases.run("first", lambda: done.append("first"))
    with pytest.raises(ValueError, match="on purpose"):
        phases.run("second", fail)
    again = Phases(tmp_path / "phases.json")
    again.run("first", lambda: done.append("first again"))
    again.run("second", lambda: done.append("second"))
    assert done == ["first", "second"]
    assert list(Phases(tmp_path / "phases.json").intervals) == ["first", "second"]


def test_who_waits_for_a_phase_of_the_other_process_goes_on_when_it_is_done(tmp_path: Path) -> None:
    path, done = tmp_path / "phases.json", []
    reader = Phases(path)
    timer = Timer(0.2, lambda: Phases(path).run("made", lambda: done.append("made")))
    timer.start()
    reader.wait_for("made")
    timer.join()
    assert done == ["made"] and reader.seconds["made"] >= 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_the_time_covered_is_every_second_in_which_something_ran(spans: list[tuple[int, int]]) -> None:
    ran = np.zeros(100, np.bool_)
    for began, length in spans:
        ran[began : began + length] = True
    assert covered((began, began + length) for began, length in spans) == ran.sum()
