import json
from itertools import count
from pathlib import Path

import pytest

from megatron_npr.monitoring.spans import record_spans, span


def test_nested_spans_are_written_in_the_order_of_their_ends(tmp_path: Path) -> None:
    ticks = count()
    with record_spans(tmp_path / "spans.jsonl", clock=lambda: float(next(ticks))) as log, span("step"):
        with span("rollout"):
            pass
        with span("train"):
            pass
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(record["name"], record["depth"], record["seconds"]) for record in records] == [
        ("rollout", 1, 1.0),
        ("train", 1, 1.0),
        ("step", 0, 5.0),
    ]
    assert log.totals() == {"rollout": 1.0, "train": 1.0, "step": 5.0}


def test_a_span_without_a_log_times_itself() -> None:
    with span("alone") as measured:
        pass
    assert measured.seconds > 0


def test_a_span_ends_when_its_block_raises(tmp_path: Path) -> None:
    with record_spans(tmp_path / "spans.jsonl") as log, pytest.raises(RuntimeError), span("fails"):
        raise RuntimeError
    assert log.depth == 0
    assert list(log.totals()) == ["fails"]
