"""The soak, short: see tests/bench/engine_soak.py for what it asserts."""

from tests.bench.engine_soak import soak


def test_under_load_with_memory_for_a_third_nothing_is_lost_and_nobody_starves() -> None:
    report = soak(1_500, seed=1)
    assert report.lost_blocks == 0 and report.requests > 200
    assert min(report.preemptions, report.forks, report.joins) > 20
    assert set(report.reasons) >= {"eos", "length", "malformed", "aborted"}
