"""The bench of hostile text reads every kind with every reader."""

from megatron_npr.bench.cpu import text


def test_every_reader_meets_every_kind_of_hostile_text() -> None:
    figures = text.measure(1 << 11)
    costs = figures["costs"]
    assert isinstance(costs, list)
    assert [(cost["reader"], cost["text"]) for cost in costs] == [
        (reader, kind) for reader in text.READERS for kind in text.HOSTILE
    ]
    assert all(cost["seconds"] > 0 and cost["seconds_of_half"] > 0 for cost in costs)
