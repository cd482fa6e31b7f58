"""Whole numbers and tuples of them compare by their digits as math-verify compares them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_npr.rl.verifier import Verdict, Verifier
from megatron_npr.rl.verifier_worker import equal

NUMBERS = st.integers(0, 12).map(str)
TUPLES = st.lists(st.integers(0, 3), min_size=2, max_size=4).map(
    lambda values: f"({','.join(map(str, values))})"
)
SIGNED = st.integers(-3, 3).map(str)


@settings(max_examples=60)
@given(answer=NUMBERS | TUPLES | SIGNED, gold=NUMBERS | TUPLES | SIGNED)
def test_comparing_digits_agrees_with_math_verify(answer: str, gold: str) -> None:
    with Verifier(1, timeout_seconds=0.0) as without_algebra:
        assert without_algebra.judge([(answer, gold)]) == [Verdict(equal(answer, gold))]  # none timed out
