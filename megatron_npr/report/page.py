"""report.html: one self-contained page, readable from top to bottom: did it work, by how much, why believe it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_npr.monitoring.metrics import read_metrics
from megatron_npr.report import charts
from megatron_npr.report.records import STAGES, TITLES, DemoResult, StageFigures, Timeline
from megatron_npr.report.thresholds import check
from megatron_npr.report.timeline import drawing, response_html

STYLE = Path(__file__).parents[1] / "assets" / "report.css"
COLUMNS = (
    ("accuracy", "accuracy, T = 1"),
    ("accuracy_greedy", "greedy"),
    ("accuracy_top_p", "top_p 0.7"),
    ("format_valid", "format valid"),
    ("format_valid_unforced", "valid, unforced"),
    ("parallel_rate", "parallel rate"),
    ("mean_total_tokens", "tokens"),
    ("mean_critical_path", "critical path"),
    ("tokens_per_second", "tokens/s"),
)


def page(folder: Path, result: DemoResult) -> str:
    """The whole page; `folder` is what the paths of the curves are relative to."""
    sections = [
        _head(result),
        _cards(result),
        _stage_table(result),
        _comparisons(result),
        _thresholds(result.to_report()),
        _curves(folder, result),
        _timelines(result.timelines),
        _time(result),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>NPR demo, seed {result.seed}</title><style>{STYLE.read_text()}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(result: DemoResult) -> str:
    all_thresholds = check(result.to_report())
    missed = sum(not threshold.held for threshold in all_thresholds)
    badge = (
        f'<span class="badge missed">{missed} of {len(all_thresholds)} thresholds missed</span>'
        if missed
        else f'<span class="badge held">all {len(all_thresholds)} thresholds held</span>'
    )
    minutes = result.wall_seconds / 60
    return (
        "<h1>A language model learns to reason in parallel branches</h1>"
        f'<p class="soft">Seed {result.seed}, {minutes:.1f} minutes, {result.num_problems} held-out problems x '
        f"{result.samples_per_problem} samples, the same problems for every stage. {badge}</p>"
    )


def _cards(result: DemoResult) -> str:
    stages, gain, speed = result.stages, result.comparisons["npr - beta"], result.speedup
    npr = stages["npr"]
    cards = [
        (
            f"{npr.accuracy:.1%}",
            f"accuracy of NPR; base {stages['base'].accuracy:.1%} in the parallel format",
        ),
        (
            f"{100 * gain.delta:+.1f}",
            f"points by PAPO over parallel SFT, 95 % [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
        ),
        (f"{npr.parallel_rate:.1%}", "of NPR's responses are valid and ran branches in the same steps"),
        (f"{speed.batch_1:.2f}x", f"faster than sequential decoding at batch 1; ideal {speed.ideal:.2f}x"),
    ]
    return f'<div class="cards">{"".join(f"<div class=card><b>{a}</b><span>{escape(b)}</span></div>" for a, b in cards)}</div>'


def _stage_table(result: DemoResult) -> str:
    named = [(name, result.stages[name]) for name in STAGES if name in result.stages]
    named += list(result.controls.items())
    rows = [_stage_row(name, figures) for name, figures in named]
    dots = [
        (TITLES.get(name, name), "strong" if name == "npr" else "plain", f.accuracy, *f.accuracy_ci95)
        for name, f in named
    ]
    return (
        "<h2>Stages</h2><p>Accuracy at T = 1 with its 95 % bootstrap interval over problems. Zero decodes sequentially; Beta "
        "and NPR branch in the engine, grammar constraint off. The engine writes some tags itself, so <em>valid, unforced</em> "
        "decodes the same model as one plain sequence, nothing forced.</p>"
        + _table(["", *(title for _, title in COLUMNS)], rows)
        + f'<div class="scroll timeline-box">{charts.interval_dots(dots)}</div>'
    )


def _stage_row(name: str, figures: StageFigures) -> tuple[str, list[str]]:
    low, high = figures.accuracy_ci95
    cells = [escape(TITLES.get(name, name))]
    for key, _ in COLUMNS:
        value = float(getattr(figures, key))
        text = (
            f"{value:,.0f}"
            if key == "tokens_per_second"
            else f"{value:.1f}"
            if value > 1.5
            else f"{value:.3f}"
        )
        cells.append(f"{text} <small>[{low:.3f}, {high:.3f}]</small>" if key == "accuracy" else text)
    return (
        "strong" if name == "npr" else "control" if TITLES.get(name, "").startswith("Control") else ""
    ), cells


def _comparisons(result: DemoResult) -> str:
    rows = [
        (
            "",
            [
                escape(name),
                f"{value.delta:+.3f}",
                f"[{value.low:+.3f}, {value.high:+.3f}]",
                _p_value(value.p_value),
            ],
        )
        for name, value in result.comparisons.items()
    ]
    speed = result.speedup
    speeds = [
        ("", [f"batch {batch}", f"{steps:.2f}x", f"{wall:.2f}x", f"{speed.ideal:.2f}x"])
        for batch, steps, wall in ((1, speed.steps_1, speed.batch_1), (32, speed.steps_32, speed.batch_32))
    ]
    return (
        "<h2>Differences</h2><p>Paired over the same problems: bootstrap interval over problems, two-sided p by sign-flip "
        "permutation. Controls stand beside the stages, whatever they show.</p>"
        + _table(["accuracy", "difference", "95 % interval", "p"], rows)
        + "<h2>Speed</h2><p>Same weights, one run: wall time of sequential decoding of equally long responses over that of "
        "parallel decoding, and the same of engine steps, which no clock touches. The ideal is total / critical-path tokens of "
        "those responses; the median "
        f"<code>&lt;step&gt;</code> has {speed.median_step_tokens:.0f} tokens. Wall time depends on the machine and on what "
        "else it does: no threshold is on it.</p>"
        + _table(["engine", "fewer engine steps", "wall time", "ideal"], speeds)
    )


def _thresholds(report: dict[str, Any]) -> str:
    rows = [
        (
            "",
            [
                escape(threshold.name),
                f"{threshold.measured:.4g}{threshold.unit}",
                f"{escape(threshold.relation)} {threshold.bound:.4g}{threshold.unit}",
                '<span class="held">held</span>' if threshold.held else '<b class="missed">missed</b>',
            ],
        )
        for threshold in check(report)
    ]
    return "<h2>Thresholds</h2>" + _table(["figure", "measured", "required", ""], rows)


def _curves(folder: Path, result: DemoResult) -> str:
    parts = ["<h2>Learning curves</h2>" if result.curves else ""]
    for title, path in result.curves.items():
        figures = [
            f'<figure class="panel"><figcaption>{escape(name.replace("_", " "))}</figcaption>{svg}</figure>'
            for name, svg in charts.curves(read_metrics(folder / path))
        ]
        parts.append(f'<h3>{escape(title)}</h3><div class="grid-charts">{"".join(figures)}</div>')
    return "".join(parts)


def _timelines(timelines: Sequence[Timeline]) -> str:
    if not timelines:
        return ""
    parts = [
        "<h2>Branch timelines</h2><p>Real rollouts of NPR, drawn from the engine's trace: a column is one decode step of the "
        "engine, a lane a branch, a cell a token (hover it). Cells of one column were decoded together; pale cells were "
        "forced by the engine, not sampled.</p>"
    ]
    for timeline in timelines:
        rollout = timeline.rollout
        verdict = (
            '<span class="held">right</span>' if timeline.correct else '<span class="missed">wrong</span>'
        )
        steps = int(rollout.decode_steps.max()) - int(rollout.decode_steps.min()) + 1
        parts.append(
            f"<h3>{escape(timeline.question)}</h3>"
            f'<p class="soft">{verdict}, gold answer {escape(timeline.gold)}; {rollout.num_tokens} tokens in {steps} decode '
            f"steps, critical path {rollout.critical_path}</p>"
            f'<div class="scroll timeline-box">{drawing(timeline)}</div>'
            f"<details open><summary>the response, coloured by branch</summary>"
            f'<div class="panel response">{response_html(timeline)}</div></details>'
        )
    return "".join(parts)


def _time(result: DemoResult) -> str:
    share = result.evaluation_seconds / result.busy_seconds
    bars = "".join(
        f"<h3>{escape(process)}</h3>{charts.stacked_bar(seconds)}"
        for process, seconds in result.phase_seconds.items()
    )
    return (
        f"<h2>Where the time went</h2><p>{result.wall_seconds:.0f} s in all, in two processes; {share:.0%} of their work was "
        f"evaluation.</p>{bars}"
        f"<h2>Reproduce</h2><p><code>make demo SEED={result.seed}</code>. The numbers of this page stand in "
        "<code>report.json</code>.</p>"
    )


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Cells are HTML; a row is (CSS class, cells)."""
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for kind, cells in rows
    )
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return (
        f'<div class="scroll wrap"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
