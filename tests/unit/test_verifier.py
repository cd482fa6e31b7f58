"""The verifier: math-verify's verdicts, order in tuples, time-outs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_npr.verifier import Verifier


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(1, compare_whole_numbers=False) as verifier:
        yield verifier


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("(65,258,354)", "(65,258,354)", True),
        ("(65, 258, 354)", "(65,258,354)", True),
        ("(65,354,258)", "(65,258,354)", False),
        ("(65,258)", "(65,258,354)", False),
        ("(65,258,354,387,413)", "(65,258,354,387,412)", False),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{2}{4}", "\\frac12", True),
        ("27.0", "27", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("28", "27", False),
        ("", "27", False),
        (None, "27", False),
        ("(65,258", "(65,258,354)", False),
        ("no idea", "27", False),
    ],
)
def test_math_verify_compares_answers(verifier: Verifier, answer: str | None, gold: str, right: bool) -> None:
    assert verifier.correct(answer, gold) is right


def test_many_claims_keep_their_order_and_are_decided_once_each(verifier: Verifier) -> None:
    claims = [("1", "1"), ("2", "1"), (None, "1"), ("\\frac{4}{4}", "1"), ("2", "1")]
    assert verifier.correct_all(claims) == [True, False, False, True, False]


def test_an_answer_that_takes_too_long_is_wrong_and_counted_and_the_next_is_decided() -> None:
    seconds_of_work = "+".join(f"x^{{{power}}}" for power in range(300))
    with Verifier(1, timeout_seconds=0.0) as verifier:
        assert verifier.correct(seconds_of_work, f"1+{seconds_of_work}-1") is False
        assert verifier.num_timeouts == 1
    with Verifier(1) as verifier:
        assert verifier.correct("x^2+2x+1", "(x+1)^2") is True


def test_ctrl_c_in_the_terminal_does_not_reach_a_worker_that_is_just_starting() -> None:
    script = (
        "import signal; from megatron_npr.verifier import Verifier\n"
        "signal.signal(signal.SIGINT, lambda number, frame: None)\n"
        "print('go', flush=True)\n"
        "with Verifier(1) as verifier: print(verifier.correct('x^2+2x+1', '(x+1)^2'))\n"
        "input()\n"  # at its end Python gives SIGINT its usual effect back
    )
    command = [sys.executable, "-c", script]
    # A process group of its own, as the terminal's foreground job is one.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        for _ in range(5):  # math-verify takes a second to import
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate("\n")
    assert (said, process.returncode) == ("True\n", 0)
