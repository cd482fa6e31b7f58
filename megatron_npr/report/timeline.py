"""The branch timeline of a rollout: which branch produced a token in which decode step, drawn from the trace alone.

decode step ──►
trunk     ████████                    ██████
branch 1          ███████████
branch 2          ████████               fork and join are where lanes start and end
"""

from collections import defaultdict
from html import escape

from megatron_npr.report.records import Timeline

LANE, GAP, LEFT, TOP = 20, 6, 74, 22
DRAWING = 1180  # width that a timeline aims at
COLORS = 8


def lane_class(branch: int) -> str:
    """The colour class of a lane: trunk, or one of eight for branches."""
    return "trunk" if branch == 0 else f"c{(branch - 1) % COLORS}"


def drawing(timeline: Timeline) -> str:
    """SVG: x is the decode step, a lane a branch, a cell a token; its text shows on hover."""
    rollout = timeline.rollout
    steps, branches = rollout.decode_steps.tolist(), rollout.branch_ids.tolist()
    first, last, lanes = min(steps), max(steps), max(branches) + 1
    cell = min(16.0, max(5.0, (DRAWING - LEFT) / (last - first + 1)))
    width, height = LEFT + cell * (last - first + 1) + 8, TOP + lanes * (LANE + GAP) + 24
    parts = [
        f'<svg class="timeline" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}" role="img">'
    ]
    for lane in range(lanes):
        y = TOP + lane * (LANE + GAP)
        name = "trunk" if lane == 0 else f"branch {lane}"
        parts.append(f'<text class="label" x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{name}</text>')
        parts.append(
            f'<rect class="lane" x="{LEFT}" y="{y}" width="{cell * (last - first + 1):.1f}" height="{LANE}"/>'
        )
    for step in range(first, last + 1):
        if (step - first) % 10 == 0:
            x = LEFT + cell * (step - first)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 8}">{step - first}</text>')
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for token, place in enumerate(zip(steps, branches, strict=True)):
        places[place].append(token)
    for (step, branch), tokens in places.items():
        left, top = LEFT + cell * (step - first), TOP + branch * (LANE + GAP)
        share = LANE / len(tokens)  # tokens forced in one step stand on top of each other
        for index, token in enumerate(tokens):
            parts.append(_cell(timeline, token, step - first, left, top + index * share, cell, share))
    parts.append(
        f'<text class="tick" x="{LEFT}" y="{height - 6}">decode step (one engine step each)</text></svg>'
    )
    return "".join(parts)


def _cell(
    timeline: Timeline, token: int, step: int, left: float, top: float, width: float, height: float
) -> str:
    rollout = timeline.rollout
    branch, forced = int(rollout.branch_ids[token]), bool(rollout.forced[token])
    piece = timeline.pieces[token]
    lane = "trunk" if branch == 0 else f"branch {branch}"
    how = "forced by the engine" if forced else f"p = {_probability(rollout.logprobs[token])}"
    kind = f"{lane_class(branch)}{' forced' if forced else ''}"
    rectangle = (
        f'<rect class="cell {kind}" x="{left:.1f}" y="{top:.1f}" width="{width - 0.8:.1f}" '
        f'height="{max(height - 0.8, 1.2):.1f}" rx="1.5"/>'
    )
    shown = piece if len(piece) == 1 and not piece.isspace() and width >= 9 and height >= 14 else ""
    letter = (
        f'<text class="piece" x="{left + width / 2:.1f}" y="{top + 14:.1f}" text-anchor="middle">{escape(shown)}</text>'
        if shown
        else ""
    )
    return f"<g><title>{escape(visible(piece))}   {lane}, step {step}, {how}</title>{rectangle}{letter}</g>"


def response_html(timeline: Timeline) -> str:
    """The response's text, every run of tokens tinted by its lane; forced tokens are underlined."""
    rollout = timeline.rollout
    parts: list[str] = []
    open_class = ""
    for piece, branch, forced in zip(
        timeline.pieces, rollout.branch_ids.tolist(), rollout.forced.tolist(), strict=True
    ):
        kind = f"tint {lane_class(branch)}{' forced' if forced else ''}"
        if kind != open_class:
            parts.append(("</span>" if open_class else "") + f'<span class="{kind}">')
            open_class = kind
        parts.append(escape(piece))
    return "".join([*parts, "</span>" if open_class else ""])


def visible(piece: str) -> str:
    """Whitespace that a tooltip would hide, made visible."""
    return (
        piece.replace("\n", "⏎").replace("\t", "⇥")
        if piece.strip()
        else piece.replace("\n", "⏎").replace(" ", "␣")
    )


def _probability(logprob: float) -> str:
    from math import exp

    return f"{exp(logprob):.2f}"
