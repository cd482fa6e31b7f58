"""Phases of the demo: done once, seen by the other process, and timed as a clock on the wall would."""

import inspect
import json
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.demo.phases import Phases, covered, outlook
from megatron_npr.demo.run import BACKGROUND_SHARES, BETA, MAIN_SHARES, MEASURED, NPR, ZERO, Demo

TWO = {"first": 1, "second": 3}


def test_a_finished_phase_is_not_done_again_and_a_failed_one_is(tmp_path: Path) -> None:
    done: list[str] = []

    def fail() -> None:
        raise ValueError("on purpose")

    phases = Phases(tmp_path / "phases.json", TWO)
    phases.run("first", lambda: done.append("first"))
    with pytest.raises(ValueError, match="on purpose"):
        phases.run("second", fail)
    again = Phases(tmp_path / "phases.json", TWO)
    again.run("first", lambda: done.append("first again"))
    again.run("second", lambda: done.append("second"))
    assert done == ["first", "second"]
    assert list(Phases(tmp_path / "phases.json", TWO).intervals) == ["first", "second"]


def test_who_waits_for_a_phase_of_the_other_process_goes_on_when_it_is_done(tmp_path: Path) -> None:
    path, done = tmp_path / "phases.json", []
    reader = Phases(path, {"made": 1})
    timer = Timer(0.2, lambda: Phases(path, {"made": 1}).run("made", lambda: done.append("made")))
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


def written(path: Path, **intervals: tuple[float, float]) -> Path:
    path.write_text(json.dumps(intervals))
    return path


def test_the_time_left_is_the_unfinished_share_at_the_speed_of_the_finished_one(tmp_path: Path) -> None:
    main = Phases(written(tmp_path / "main.json", first=(0.0, 50.0)), TWO)
    background = Phases(tmp_path / "background.json", {"control": 5, "measure": 5})
    assert (main.seconds_left, background.seconds_left) == (150.0, None)
    assert outlook(main, background) == "(background: [1/2] control)  0:50 gone, about 2:30 left"
    written(tmp_path / "background.json", control=(0.0, 90.0))
    assert outlook(main, background) == "(background: [2/2] measure)  1:30 gone, about 2:30 left"
    written(tmp_path / "background.json", control=(0.0, 40.0), measure=(40.0, 60.0))
    assert outlook(main, background) == "1:00 gone, about 2:30 left"


def test_a_phase_is_announced_with_its_number_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = Phases(tmp_path / "phases.json", TWO)
    phases.run("first", lambda: print("at work"), lambda: "(background: nothing)")
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] first  (background: nothing)",
        "at work",
        "[1/2] first: 0 s  (background: nothing)",
    ]


def test_the_phases_of_the_demo_are_those_it_announces() -> None:
    """A phase that were run without a share, or a share without a phase, would make the outlook lie."""
    source = inspect.getsource(Demo)
    for name in (*MAIN_SHARES, *BACKGROUND_SHARES):
        kind, _, model = name.partition(" ")
        assert name in (ZERO, BETA, NPR) or f'"{name}"' in source or (kind == "measure" and model in MEASURED)
    measured = {
        name.removeprefix("measure ") for name in (*MAIN_SHARES, *BACKGROUND_SHARES) if "measure" in name
    }
    assert measured - {"speed"} == set(MEASURED)
