"""The verifier: math-verify's verdicts, order in tuples, time-outs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_npr.rl.verifier import Verdict, Verifier

ENDLESS = "9^{9^{9^9}}"
ALGEBRA = ("x^2+2x+1", "(x+1)^2")


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
    assert verifier.judge(claims) == [Verdict(right) for right in (True, False, False, True, False)]


def test_an_answer_that_takes_too_long_is_wrong_and_counted_and_the_next_is_decided() -> None:
    seconds_of_work = "+".join(f"x^{{{power}}}" for power in range(300))
    with Verifier(1, timeout_seconds=0.0) as verifier:
        assert verifier.judge([(seconds_of_work, f"1+{seconds_of_work}-1")]) == [Verdict.TIMED_OUT]
    with Verifier(1) as verifier:
        assert verifier.correct(*ALGEBRA) is True


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        ENDLESS,
        "9^{9^{9}}",
        "(10^{10^{10}})!",
        "2^{3^{4^{5^6}}}",
        "10000000!",
        "\\binom{10^9}{5\\cdot10^8}",
        "\\sum_{k=1}^{10^9} \\frac{1}{k}",
        "\\int_0^1 x^{x^{x^x}} dx",
        "\\prod_{k=1}^{1000000} k",
    ],
)
def test_every_answer_that_hangs_is_counted_as_such_on_either_side(answer: str) -> None:
    with Verifier(2, timeout_seconds=6.0) as verifier:  # math-verify's own limit is 5 s, and says "wrong"
        assert verifier.judge([(answer, "1"), ("1", answer)]) == [Verdict.TIMED_OUT] * 2


@pytest.mark.parametrize("unit", ["{", "x", "ENDEN", "2^{", "\\frac{1}{", "the answer is 3, ", "1", "1,"])
def test_an_answer_far_longer_than_the_gold_one_is_wrong_and_no_worker_reads_it(unit: str) -> None:
    others = set(workers())
    text = unit * ((1 << 20) // len(unit))
    with Verifier(1) as verifier:
        assert verifier.judge([(text, "12"), (text, text)]) == [Verdict.WRONG, Verdict.RIGHT]
        assert set(workers()) == others


def test_an_answer_may_be_much_longer_than_the_gold_one() -> None:
    ones = "+".join("1" * 100)
    with Verifier(1) as verifier:
        assert verifier.judge([(ones, "100"), (ones, "101")]) == [Verdict.RIGHT, Verdict.WRONG]


def test_verdicts_are_remembered_up_to_a_number_those_asked_for_long_ago_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_npr.rl.verifier.REMEMBERED", 2)
    claims = [(f"x+{number}", f"{number}+x") for number in range(4)]
    with Verifier(1) as verifier:
        assert verifier.judge(claims) == [Verdict.RIGHT] * 4  # more than are remembered, decided all the same
        assert verifier.judge([claims[2]]) == [Verdict.RIGHT]
        assert verifier.judge([ALGEBRA]) == [Verdict.RIGHT]  # claims[3] is what was not asked for since
        verifier.close()  # from here on memory alone answers
        assert verifier.judge([claims[2], ALGEBRA]) == [Verdict.RIGHT] * 2
        with pytest.raises(RuntimeError, match="after shutdown"):
            verifier.judge([claims[3]])


def test_a_hanging_answer_does_not_spoil_those_before_and_behind_it() -> None:
    with Verifier(1, timeout_seconds=2.0) as verifier:
        verdicts = verifier.judge([ALGEBRA, (ENDLESS, "1"), ("x+1", "1+x"), ("x", "y")])
    assert verdicts == [Verdict.RIGHT, Verdict.TIMED_OUT, Verdict.RIGHT, Verdict.WRONG]


def workers() -> list[int]:
    """This process' verifier workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"verifier_worker" in command and parent == os.getpid():
                found.append(int(entry.name))
    return found


def kill_when(ready: Callable[[int], bool], times: int) -> threading.Thread:
    """A thread that does what the kernel does where memory runs out, to the next `times` workers, each once it is `ready`."""

    def kill() -> None:
        done, until = set(others), time.monotonic() + 60
        while len(done) < len(others) + times and time.monotonic() < until:
            for worker in set(workers()) - done:
                if ready(worker):
                    os.kill(worker, signal.SIGKILL)
                    done.add(worker)
            time.sleep(0.02)

    others = frozenset(workers())
    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def cpu_seconds(worker: int) -> float:
    try:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_worker_that_was_killed_while_idle_is_replaced_and_the_claim_is_asked_again() -> None:
    others = set(workers())
    with Verifier(1) as verifier:
        assert verifier.correct(*ALGEBRA)
        (worker,) = set(workers()) - others
        os.kill(worker, signal.SIGKILL)
        while Path(f"/proc/{worker}/exe").exists():
            time.sleep(0.01)
        assert verifier.judge([("x+1", "1+x"), ("x", "y")]) == [Verdict.RIGHT, Verdict.WRONG]
    assert set(workers()) == others


@pytest.mark.parametrize(
    "ready",
    [
        pytest.param(lambda worker: True, id="starting"),
        pytest.param(lambda worker: cpu_seconds(worker) > 3.0, id="at work", marks=pytest.mark.slow),
    ],
)
def test_a_claim_that_kills_its_worker_twice_is_counted_and_the_next_is_decided(
    ready: Callable[[int], bool],
) -> None:
    with Verifier(1, timeout_seconds=60.0) as verifier:
        killer = kill_when(ready, times=2)
        assert verifier.judge([(ENDLESS, "1")]) == [Verdict.DIED]
        killer.join()
        assert verifier.judge([(ENDLESS, "1"), ALGEBRA]) == [Verdict.DIED, Verdict.RIGHT]


def test_ctrl_c_in_the_terminal_does_not_reach_a_worker_that_is_just_starting() -> None:
    script = (
        "import signal; from megatron_npr.rl.verifier import Verifier\n"
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
