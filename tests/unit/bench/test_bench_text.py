"""Readers of model text do twice the work for twice the text; the bench times them all."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from megatron_npr.bench.cpu import text
from megatron_npr.bench.cpu.text_readers import READERS, Tools

NUM_BYTES = 1 << 10


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    with text.tools(NUM_BYTES) as tools:
        yield tools


def lines_run(tools: Tools, reader: str, content: str, ids: list[int]) -> int:
    """Lines of Python that reading takes, those of a loop each time: a measure that knows no clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        READERS[reader](tools, content, ids)
    finally:
        sys.settrace(before)
    return count


# The verifier's work is done elsewhere, and bounded: see test_verifier.
@pytest.mark.parametrize("reader", [name for name in READERS if name != "verifier"])
def test_twice_the_hostile_text_is_twice_the_work(tools: Tools, reader: str) -> None:
    for kind, unit in text.HOSTILE.items():
        content, ids = text.content_of(tools, unit, NUM_BYTES // 2)
        half, whole = (lines_run(tools, reader, content * times, ids * times) for times in (1, 2))
        assert whole <= 2.05 * half, kind


def test_the_bench_times_every_reader_at_half_the_size_and_at_all_of_it() -> None:
    figures = text.measure(NUM_BYTES, {"digits": "1"})
    costs = figures["costs"]
    assert isinstance(costs, list)
    assert [(cost["reader"], cost["text"]) for cost in costs] == [(reader, "digits") for reader in READERS]
    assert all(cost["seconds"] > 0 and cost["seconds_of_half"] > 0 for cost in costs)
    assert figures["slowest_seconds"] == max(cost["seconds"] for cost in costs)
