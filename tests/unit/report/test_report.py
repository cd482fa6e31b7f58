import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_npr.monitoring.statistics import PairedDifference
from megatron_npr.report import DemoResult, check, missed_thresholds, rebuild, write_report
from npr_ext.errors import UserError
from tests.support.report_sample import result, rollout

FIGURES = {
    "accuracy",
    "accuracy_ci95",
    "accuracy_greedy",
    "accuracy_top_p_0.7",
    "format_valid",
    "format_valid_unforced",
    "parallel_rate",
    "mean_total_tokens",
    "mean_critical_path",
    "tokens_per_second",
}
VOID = {"meta", "br", "line", "circle", "rect", "polyline"}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_report_json_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    write_report(tmp_path, result(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    promised = {"wall_seconds", "seed", "stages", "npr_minus_beta", "speedup_wall", "fewer_steps"}
    assert set(report) == promised | {"controls", "details"}
    assert set(report["stages"]) == {"base", "base_sequential", "zero", "beta", "npr", "sequential_rl"}
    assert all(set(figures) == FIGURES for figures in report["stages"].values())
    assert set(report["npr_minus_beta"]) == {"delta", "ci95", "p_value"}
    assert set(report["speedup_wall"]) == {"batch_1", "batch_32", "ideal"}


def test_a_result_that_reaches_everything_misses_no_threshold(tmp_path: Path) -> None:
    assert write_report(tmp_path, result(tmp_path)) == []


def with_stage(good: DemoResult, name: str, **figures: Any) -> DemoResult:
    return replace(good, stages={**good.stages, name: replace(good.stages[name], **figures)})


@pytest.mark.parametrize(
    ("name", "figures", "line"),
    [
        ("base", {"format_valid": 0.61}, "format_valid of base is 0.61, must be <= 0.6"),
        ("zero", {"format_valid": 0.89}, "format_valid of zero is 0.89, must be >= 0.9"),
        ("beta", {"format_valid": 0.96}, "format_valid of beta is 0.96, must be >= 0.97"),
        ("npr", {"format_valid": float("nan")}, "format_valid of npr is nan, must be >= 0.97"),
        ("npr", {"parallel_rate": 0.98}, "parallel_rate of npr is 0.98, must be >= 0.99"),
        ("base_sequential", {"accuracy": 0.72}, "accuracy npr - base_sequential is 0.14, must be >= 0.15"),
        ("npr", {"accuracy_greedy": 0.80}, "greedy accuracy npr - beta is -0.03, must be >= -0.02"),
        ("npr", {"accuracy_top_p": 0.78}, "top_p 0.7 accuracy npr - beta is -0.03, must be >= -0.02"),
    ],
)
def test_a_missed_figure_of_a_stage_is_named(
    name: str, figures: dict[str, float], line: str, tmp_path: Path
) -> None:
    assert missed_thresholds(with_stage(result(tmp_path), name, **figures).to_report()) == [line]


def test_missed_gains_speeds_and_sizes_are_named(tmp_path: Path) -> None:
    bad = replace(
        result(tmp_path),
        num_problems=511,
        comparisons={"npr - beta": PairedDifference(0.02, 0.0, 0.04, 0.06)},
        speedup=replace(result(tmp_path).speedup, steps_32=1.4, ideal=1.7, median_step_tokens=41),
    )
    missed = missed_thresholds(bad.to_report())
    assert [line.split(" is ")[0] for line in missed] == [
        "held-out problems",
        "accuracy npr - beta",
        "lower end of the 95 % interval of npr - beta",
        "ideal speedup (total / critical-path tokens)",
        "engine steps that branches save at batch 32, as a share of the ideal",
        "median tokens of a step",
    ]
    assert missed[0] == "held-out problems is 511, must be >= 512"


def test_no_threshold_depends_on_how_long_anything_took(tmp_path: Path) -> None:
    quiet = result(tmp_path)
    busy = replace(
        quiet,
        wall_seconds=50 * quiet.wall_seconds,
        evaluation_seconds=50 * quiet.evaluation_seconds,
        speedup=replace(quiet.speedup, batch_1=0.5, batch_32=0.1),
        phase_seconds={
            process: {name: 50 * seconds for name, seconds in phases.items()}
            for process, phases in quiet.phase_seconds.items()
        },
        stages={name: replace(stage, tokens_per_second=0.1) for name, stage in quiet.stages.items()},
    )
    assert check(busy.to_report()) == check(quiet.to_report())


def test_a_difference_that_is_exactly_the_bound_is_enough(tmp_path: Path) -> None:
    good = with_stage(result(tmp_path), "base_sequential", accuracy=0.86 - 0.15)
    assert missed_thresholds(good.to_report()) == []


def test_the_page_is_balanced_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_report(tmp_path, result(tmp_path))
    html = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", html)


def test_the_page_shows_every_threshold_stage_and_curve(tmp_path: Path) -> None:
    made = result(tmp_path)
    write_report(tmp_path, made)
    html = (tmp_path / "report.html").read_text()
    assert html.count('class="held">held') == len(check(made.to_report()))
    assert all(title in html for title in ("Stage 1, DAPO", "Stage 3, PAPO", "Control: sequential RL"))


def test_a_timeline_has_a_cell_for_every_token(tmp_path: Path) -> None:
    write_report(tmp_path, result(tmp_path))
    html = (tmp_path / "report.html").read_text()
    made, _ = rollout()
    assert html.count('<rect class="cell') == 2 * made.num_tokens
    assert "branch 2, step 32, p = 0.90" in html
    assert "&lt;step&gt;   branch 1, step 29, forced by the engine" in html


def test_a_question_with_markup_is_text(tmp_path: Path) -> None:
    made = result(tmp_path)
    write_report(
        tmp_path, replace(made, timelines=(replace(made.timelines[0], question="<script>1</script>"),))
    )
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_a_report_is_rebuilt_from_what_was_saved(tmp_path: Path) -> None:
    write_report(tmp_path, result(tmp_path))
    before = [(tmp_path / name).read_text() for name in ("report.html", "report.json")]
    assert rebuild(tmp_path) == tmp_path / "report.html"
    assert [(tmp_path / name).read_text() for name in ("report.html", "report.json")] == before


def test_a_damaged_result_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"report": {}}')
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        rebuild(tmp_path)


def test_a_folder_without_a_result_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"result\.json: no such file; `npr demo` writes it"):
        rebuild(tmp_path)
