"""What a step warns of, and what the responses of a step are counted as."""

import numpy as np
import pytest

from megatron_npr.monitoring.jumps import WINDOW, Jumps, Share
from megatron_npr.rl.verifier import Verdict
from megatron_npr.rollout.scoring import REASONS, Scored, invalid, outcomes
from npr_engine.rollout import Rollout
from npr_ext.layout.violations import Violation


@pytest.mark.parametrize(
    ("before", "now", "total", "jumps"),
    [
        (0, 0, 128, False),
        (0, 6, 128, False),  # under 5 %
        (0, 8, 128, True),
        (2, 12, 128, True),
        (10, 20, 128, False),
        (64, 80, 128, False),
        (64, 110, 128, True),
        (110, 128, 128, True),
        (128, 128, 128, False),
        (64, 5, 128, False),  # a fall is none
        (0, 1, 16, False),  # one case of few
        (0, 3, 16, True),
        (0, 0, 0, False),
    ],
)
def test_a_share_jumps_when_its_odds_are_four_times_the_usual_ones(
    before: int, now: int, total: int, jumps: bool
) -> None:
    watch = Jumps()
    for _ in range(WINDOW):
        assert watch.take({"malformed": Share(before, total)}) == []
    lines = watch.take({"malformed": Share(now, total)})
    assert [line.partition(",")[0] for line in lines] == [f"malformed: {now} of {total}"] * jumps


def test_what_is_usual_is_what_the_last_steps_had() -> None:
    watch = Jumps()
    told = [bool(watch.take({"cut": Share(count, 100)})) for count in [1] * 20 + [60] * 20]
    assert told[:20] == [False] * 20 and told[20] and not any(told[-WINDOW:])


def test_a_first_step_warns_of_faults_alone() -> None:
    shares = {
        "malformed": Share(100, 128),
        "verifier_deaths": Share(8, 128),
        "verifier_timeouts": Share(1, 128),
    }
    lines = Jumps(frozenset({"verifier_deaths", "verifier_timeouts"})).take(shares)
    assert len(lines) == 1 and lines[0].startswith("verifier_deaths: 8 of 128")


@pytest.mark.parametrize(
    ("name", "count", "total", "warns"),
    [
        ("invalid", 16, 16, True),
        ("invalid", 15, 16, True),
        ("invalid", 14, 16, False),
        ("parallel/invalid", 512, 512, True),
        ("cut", 4, 4, True),
        ("dropped", 256, 256, True),
        ("flat_groups", 1, 1, False),  # one group says little
        ("malformed/NO_BLOCK", 16, 16, False),  # where no blocks are asked for
    ],
)
def test_what_is_useless_from_the_first_step_is_said_once(
    name: str, count: int, total: int, warns: bool
) -> None:
    watch = Jumps()
    lines = [watch.take({name: Share(count, total)}) for _ in range(3)]
    assert [line.partition(":")[0] for line in lines[0]] == [name] * warns and lines[1:] == [[], []]
    assert not warns or f"{count} of {total} from the start" in lines[0][0]


def scored(reason: str, defect: Violation, verdict: Verdict) -> Scored:
    ids, numbers, flags = np.array([1], np.int32), np.zeros(1, np.float32), np.zeros(1, np.bool_)
    rollout = Rollout("0/0/0/0", ids, ids, numbers, numbers, flags, ids, ids, ids, reason, True, False, 0)
    return Scored(rollout, 0, defect, 0.0, verdict)


def test_responses_are_counted_by_what_became_of_them() -> None:
    items = [
        scored("eos", Violation.OK, Verdict.RIGHT),
        scored("eos", Violation.OK, Verdict.TIMED_OUT),
        scored("eos", Violation.NO_BLOCK, Verdict.DIED),
        scored("malformed(STRAY_TAG)", Violation.STRAY_TAG, Verdict.WRONG),
        scored("length", Violation.UNCLOSED_STEP, Verdict.WRONG),
        scored("budget", Violation.NO_EOS, Verdict.WRONG),
    ]
    found = outcomes(items)
    assert invalid(items) == Share(4, 6)
    assert {share.total for share in found.values()} == {6}
    assert {name: share.count for name, share in found.items() if share.count} == {
        "cut": 2,
        "verifier_timeouts": 1,
        "verifier_deaths": 1,
        "malformed": 2,
        "malformed/NO_BLOCK": 1,
        "malformed/STRAY_TAG": 1,
    }
    assert set(found) == set(outcomes([])) and {f"malformed/{reason}" for reason in REASONS} < set(found)
