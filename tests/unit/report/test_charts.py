import pytest

from megatron_npr.report.charts import curves, ticks


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (0.0012, 0.0019), (1e4, 9e4)])
def test_ticks_are_few_round_numbers_inside_the_axis(low: float, high: float) -> None:
    places = ticks(low, high)
    assert 2 <= len(places) <= 7
    assert all(low - 1e-9 <= place <= high + 1e-9 for place in places)


def test_a_metric_without_two_numbers_has_no_curve() -> None:
    steps = [{"step": 0, "loss": 1.0, "accuracy": None}, {"step": 1, "loss": None, "accuracy": None}]
    assert curves(steps) == []


def test_gaps_are_left_out_of_a_curve() -> None:
    [(name, svg)] = curves([{"step": step, "loss": None if step == 1 else float(step)} for step in range(4)])
    assert name == "loss"
    assert svg.count("<circle") == 3


def test_a_constant_metric_is_drawn() -> None:
    [(_, svg)] = curves([{"step": step, "loss": 2.0} for step in range(3)])
    assert "nan" not in svg
