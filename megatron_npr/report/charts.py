"""Small SVG charts: learning curves, dots with intervals, one stacked bar. Colours come from the page's style sheet."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from megatron_npr.monitoring.metrics import Record

SHARES = ("accuracy", "format_valid", "clipped")
SHOWN = (
    "accuracy",
    "format_valid",
    "reward",
    "loss",
    "kept",
    "response_tokens",
    "critical_path",
    "grad_norm",
    "clipped",
    "entropy",
    "dropped",
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 180, 42, 10, 12, 24
SMOOTHING = 0.7


def curves(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(metric, SVG) for each known metric that has at least two numbers."""
    charts = []
    for name in SHOWN:
        points = [
            (float(record["step"]), float(record[name])) for record in records if record.get(name) is not None
        ]
        if len(points) >= 2:
            charts.append((name, _curve(points, (0.0, 1.0) if name in SHARES else None)))
    return charts


def _curve(points: Sequence[tuple[float, float]], limits: tuple[float, float] | None) -> str:
    """The values faint, their exponential moving average on top; hovering a point shows its value."""
    low, high = limits or _padded([y for _, y in points])
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in ticks(low, high):
        _, y = place(first, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for x, anchor in ((first, "start"), (last, "end")):
        at, _ = place(x, low)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{x:.0f}</text>'
        )
    raw = [place(x, min(max(y, low), high)) for x, y in points]
    smooth = [place(x, min(max(y, low), high)) for x, y in _smoothed(points)]
    parts.append(
        f'<polyline class="raw" points="{_path(raw)}"/><polyline class="line" points="{_path(smooth)}"/>'
    )
    for (x, y), (left, top) in zip(points, raw, strict=True):
        parts.append(
            f'<circle class="hover" cx="{left:.1f}" cy="{top:.1f}" r="4"><title>step {x:.0f}: {number(y)}</title></circle>'
        )
    return "".join([*parts, "</svg>"])


def interval_dots(rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Rows of (label, CSS class, value, low, high), shares of one: a dot and its interval on a common axis."""
    left, width, step = 190, 640, 30
    height = step * len(rows) + 30

    def across(value: float) -> float:
        return left + value * (width - left - 50)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" class="dots">']
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:.2f}</text>'
        )
    for index, (label, kind, value, low, high) in enumerate(rows):
        y = 18 + step * index
        parts.append(
            f'<text class="label" x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
        )
        parts.append(
            f'<g class="{kind}"><line x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle cx="{across(value):.1f}" cy="{y}" r="5"/></g>')
        parts.append(f'<text class="value" x="{across(high) + 9:.1f}" y="{y + 4}">{value:.3f}</text>')
    return "".join([*parts, "</svg>"])


def stacked_bar(parts: Mapping[str, float]) -> str:
    """Shares of a whole, as a bar with a legend (plain HTML)."""
    total = sum(parts.values())
    segments, legend = [], []
    for index, (name, value) in enumerate(parts.items()):
        color = f"c{index % 8}"
        text = f"{escape(name)}: {value:.0f} s, {value / total if total else 0:.0%}"
        segments.append(f'<span class="fill {color}" style="flex:{value:.3f}" title="{text}"></span>')
        legend.append(f'<li><span class="key fill {color}"></span>{text}</li>')
    return f'<div class="bar">{"".join(segments)}</div><ul class="legend">{"".join(legend)}</ul>'


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Four digits at most, never a long tail."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    constant = high - low <= 1e-9 * max(abs(low), abs(high))  # but for rounding
    pad = max(abs(high) * 0.1, 1e-3) if constant else 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.3 * high else low - pad), high + pad


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    average, result = points[0][1], []
    for x, y in points:
        average = SMOOTHING * average + (1 - SMOOTHING) * y
        result.append((x, average))
    return result


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
