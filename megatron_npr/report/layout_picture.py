"""The layout of one small response as a picture: its text, the dense mask, the tiles, the timeline.

branch_layout ──► visible() ──► 1 dense mask      block_mask(4) ──► 2 tiles      position_ids ──► 3 timeline

Everything that is drawn comes from these three; equal inputs give equal bytes. Colours stand in the file, on a light
ground of its own, so that it looks the same on light and dark pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby

import torch
from torch import Tensor

from npr_ext import BranchLayout, branch_layout
from npr_ext.testing import FIRST_TEXT_TOKEN, TAGS

BLOCK = 4  # 128 on a GPU
NEWLINE = "⏎"
NUM_PROMPT_TOKENS = 3
TEXT = (
    "12×3 +4×5 +6×7=? "
    "<guideline> <plan> 1: 12×3 </plan> <plan> 2: 4×5 </plan> <plan> 3: 6×7 </plan> </guideline> "
    "⏎ <step> 1: 12×3 =30+6 =36 </step> ⏎ <step> 2: 4×5 =20 </step> ⏎ <step> 3: 6×7 =35 +7 =42 </step> "
    "⏎ <takeaway> 36,20,42 </takeaway> "
    "<guideline> <plan> 1: add </plan> <plan> 2: check </plan> </guideline> "
    "⏎ <step> 1: 36+20 =56 +42 =98 </step> ⏎ <step> 2: 40+20+40 ≈100 </step> "
    "⏎ <takeaway> 98 </takeaway> \\boxed{98} <eos>"
)
"""One token a word: a prompt, a block of three branches, a block of two."""

INK, SOFT, RULE, PAPER = "#1d2024", "#5c646d", "#d9dbd6", "#ffffff"
COLORS = ("#717983", "#3366d0", "#c66d05", "#14825f")  # trunk and branches
FORCED = ("#d3d6da", "#bccdf3", "#f6d9b3", "#b3dfd2")
FULL, PARTIAL, HIDDEN, LATER = "#4a5563", "#b4bcc6", "#f7cfca", "#f4f5f2"
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
MONO = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"

WIDTH, MARGIN = 1220, 26
TEXT_TOP, TEXT_LINE, LETTER = 86, 27, 7.9
PANEL_TOP, SIDE = 276, 330  # the mask and the tiles are squares
LEFT_1 = MARGIN + 84
LEFT_2 = LEFT_1 + SIDE + 34
LEFT_3 = LEFT_2 + SIDE + 100
LANE, LANE_GAP = 22, 7


@dataclass(frozen=True)
class Example:
    """The response that is drawn: [T] words, and which of them the engine forces."""

    words: tuple[str, ...]
    forced: tuple[bool, ...]
    layout: BranchLayout


def draw() -> str:
    """The picture, SVG."""
    example = small_example()
    height = PANEL_TOP + SIDE + 66
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" font-family="{SANS}" fill="{INK}">',
        "<title>The branch layout of a small response: dense mask, tiles, timeline</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="12" fill="{PAPER}" stroke="{RULE}"/>',
        *_heading(example.layout),
        *_text(example),
        *_mask_panel(example),
        *_tile_panel(example.layout),
        *_timeline_panel(example),
        *_array_table(example),
        "</svg>\n",
    ]
    return "\n".join(parts)


def small_example() -> Example:
    """The words of TEXT, laid out."""
    words = TEXT.split()
    tags = {
        f"</{name[:-4]}>" if name.endswith("_end") else f"<{name}>": token
        for name, token in vars(TAGS).items()
    }
    ids = [tags.get(word, FIRST_TEXT_TOKEN + index) for index, word in enumerate(words)]
    layout = branch_layout(torch.tensor(ids), tags=TAGS, prompt_lengths=NUM_PROMPT_TOKENS)
    assert layout.violations() == ()
    return Example(tuple(words), _forced(words), layout)


def _forced(words: list[str]) -> tuple[bool, ...]:
    """The engine writes `⏎ <step> N:` and `⏎ <takeaway>`, the model the rest."""
    length_of = {"<step>": 3, "<takeaway>": 2}
    forced = [False] * len(words)
    for index, word in enumerate(words):
        if word == NEWLINE:
            length = length_of[words[index + 1]]
            forced[index : index + length] = [True] * length
    return tuple(forced)


def _heading(layout: BranchLayout) -> list[str]:
    """Title, what it says, and the colours."""
    positions = int(layout.position_ids.max()) + 1
    says = (
        f"{layout.num_tokens} tokens (a word is a token) at {positions} positions: the branches of a block are "
        "decoded side by side and do not see each other."
    )
    parts = [
        _label(MARGIN, 42, "A small response and its layout", 22, weight=650),
        _label(MARGIN, 68, says, 15, SOFT),
    ]
    x = float(WIDTH - MARGIN - 530)
    for name, fills, wide in (
        ("trunk", COLORS[:1], 78),
        ("branch 1", COLORS[1:2], 100),
        ("branch 2", COLORS[2:3], 100),
        ("branch 3", COLORS[3:4], 100),
        ("forced by engine", FORCED[1:], 0),
    ):
        for index, fill in enumerate(fills):
            parts.append(_box(x + index * 14 / len(fills), 30, 14 / len(fills), 14, fill))
        parts.append(_label(x + 20, 42, name, 14, SOFT))
        x += wide
    return parts


def _text(example: Example) -> list[str]:
    """Every token on the colour of its branch; a new line at every fork and join."""
    branches = example.layout.branch_ids.tolist()
    parts = []
    lines = groupby(range(len(branches)), key=lambda index: branches[index] > 0)
    for line, (_, tokens) in enumerate(lines):
        x, y = float(MARGIN), TEXT_TOP + line * TEXT_LINE
        for token in tokens:
            word, forced = example.words[token], example.forced[token]
            wide = LETTER * len(word) + 10
            fill = (FORCED if forced else COLORS)[branches[token]]
            parts.append(_box(x, y, wide, 21, fill, radius=3))
            parts.append(
                f'<text x="{x + wide / 2:.1f}" y="{y + 15.5:.1f}" font-size="13" font-family="{MONO}" '
                f'text-anchor="middle" fill="{INK if forced else PAPER}">{escape(word)}</text>'
            )
            x += wide + 3
    return parts


def _mask_panel(example: Example) -> list[str]:
    """Row q, column k: the colour of k's branch where q sees k."""
    layout = example.layout
    scale = SIDE / layout.num_tokens
    visible = layout.visible()
    hidden = torch.ones_like(visible).tril() & ~visible
    parts = [
        _label(LEFT_1, PANEL_TOP - 16, "1  Dense mask: who sees whom", 16, weight=650),
        _box(LEFT_1, PANEL_TOP, SIDE, SIDE, LATER),
        f'<g transform="translate({LEFT_1} {PANEL_TOP}) scale({scale:.5f})">',
        f'<path fill="{HIDDEN}" d="{_cells(hidden)}"/>',
    ]
    for branch, color in enumerate(COLORS):
        parts.append(f'<path fill="{color}" d="{_cells(visible & (layout.branch_ids == branch))}"/>')
    parts.append("</g>")
    parts += _unit_labels(example, scale)
    parts += _legend(
        LEFT_1,
        [
            (f"{layout.visible_pairs()} pairs visible", COLORS[0], 152),
            (f"{int(hidden.sum())} hidden: siblings", HIDDEN, 0),
        ],
    )
    parts.append(
        _label(LEFT_1, PANEL_TOP + SIDE + 48, "row: query, column: key, colour: the key's branch", 14, SOFT)
    )
    return parts


def _unit_labels(example: Example, scale: float) -> list[str]:
    """What the rows of the mask are, at its left."""
    parts = []
    for name, begin, end in _units(example):
        y = PANEL_TOP + (begin + end) / 2 * scale + 4.5
        branch = int(example.layout.branch_ids[begin])
        color = COLORS[branch] if branch else SOFT
        parts.append(_label(LEFT_1 - 11, y, name, 14, color, anchor="end"))
        parts.append(
            _box(LEFT_1 - 7, PANEL_TOP + begin * scale + 0.6, 3.5, (end - begin) * scale - 1.2, color)
        )
    return parts


def _units(example: Example) -> list[tuple[str, int, int]]:
    """(name, begin, end) of the stretches of the response."""
    branches, words = example.layout.branch_ids.tolist(), example.words
    units = [("prompt", 0, NUM_PROMPT_TOKENS)]
    for branch, members in groupby(range(NUM_PROMPT_TOKENS, len(branches)), key=branches.__getitem__):
        tokens = list(members)
        begin, end = tokens[0], tokens[-1] + 1
        if branch:
            units.append((f"branch {branch}", begin, end))
            continue
        if "</takeaway>" in words[begin:end]:
            join = words.index("</takeaway>", begin) + 1
            units.append(("takeaway", begin, join))
            begin = join
        units.append(("plans" if "<plan>" in words[begin:end] else "answer", begin, end))
    return units


def _tile_panel(layout: BranchLayout) -> list[str]:
    """The lists of `block_mask`: what attention computes."""
    mask = layout.block_mask(BLOCK)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    partial = _tiles(mask.kv_num_blocks, mask.kv_indices)
    full = _tiles(mask.full_kv_num_blocks, mask.full_kv_indices)
    fills = {**dict.fromkeys(partial, PARTIAL), **dict.fromkeys(full, FULL)}
    num_blocks = mask.kv_num_blocks.shape[-1]
    causal = num_blocks * (num_blocks + 1) // 2
    wide = SIDE * BLOCK / layout.num_tokens
    parts = [_label(LEFT_2, PANEL_TOP - 16, "2  Tiles: what is computed", 16, weight=650)]
    for row in range(num_blocks):
        for column in range(num_blocks):
            fill = fills.get((row, column), HIDDEN if column <= row else LATER)
            x, y = LEFT_2 + column * wide, PANEL_TOP + row * wide
            parts.append(_box(x + 0.6, y + 0.6, wide - 1.2, wide - 1.2, fill, radius=2))
    parts += _legend(
        LEFT_2,
        [
            (f"{len(full)} full", FULL, 84),
            (f"{len(partial)} partial", PARTIAL, 100),
            (f"{causal - len(fills)} absent", HIDDEN, 0),
        ],
    )
    parts.append(
        _label(LEFT_2, PANEL_TOP + SIDE + 48, f"{BLOCK} × {BLOCK} here, 128 × 128 on a GPU", 14, SOFT)
    )
    return parts


def _legend(left: float, entries: list[tuple[str, str, int]]) -> list[str]:
    """(name, colour, width) of each entry, below a panel."""
    parts, x = [], left
    for name, fill, wide in entries:
        parts.append(_box(x, PANEL_TOP + SIDE + 14, 14, 14, fill))
        parts.append(_label(x + 20, PANEL_TOP + SIDE + 26, name, 14, SOFT))
        x += wide
    return parts


def _timeline_panel(example: Example) -> list[str]:
    """x is the position, a lane a branch: tokens of one decode step stand in one column."""
    positions = example.layout.position_ids.tolist()
    branches = example.layout.branch_ids.tolist()
    step = (WIDTH - MARGIN - LEFT_3) / (max(positions) + 1)
    top = PANEL_TOP + 20
    lanes = max(branches) + 1
    parts = [_label(LEFT_3 - 76, PANEL_TOP - 16, "3  Timeline: position = decode step", 16, weight=650)]
    for tick in range(0, max(positions) + 1, 10):
        x = LEFT_3 + tick * step
        parts.append(f'<path d="M{x:.1f} {top - 4}v{lanes * (LANE + LANE_GAP)}" stroke="{RULE}"/>')
        parts.append(_label(x, top - 8, str(tick), 13, SOFT))
    for lane in range(lanes):
        name = f"branch {lane}" if lane else "trunk"
        y = top + lane * (LANE + LANE_GAP) + 16
        parts.append(_label(LEFT_3 - 11, y, name, 14, COLORS[lane] if lane else SOFT, anchor="end"))
    for position, branch, forced in zip(positions, branches, example.forced, strict=True):
        y = top + branch * (LANE + LANE_GAP)
        fill = (FORCED if forced else COLORS)[branch]
        parts.append(_box(LEFT_3 + position * step + 0.4, y, step - 0.8, LANE, fill, radius=1))
    return parts


def _array_table(example: Example) -> list[str]:
    """The five arrays at the tokens around the first fork and join."""
    layout = example.layout
    branches = layout.branch_ids.tolist()
    fork = example.words.index("</guideline>")
    join = next(token for token in range(fork + 1, len(branches)) if branches[token] == 0)
    first = {branch: branches.index(branch) for branch in range(1, max(branches) + 1)}
    rows = [("</guideline>", fork)]
    rows += [(f"⏎ branch {branch}", token) for branch, token in first.items()]
    rows += [("⏎ join", join)]
    top = PANEL_TOP + 176
    left = LEFT_3 - 76
    parts = [_label(left, top, "The layout: five int32 for each token", 16, weight=650)]
    headers = ("position", "hidden from", "hidden until", "sequence end", "prede- cessor")
    right = [WIDTH - MARGIN - offset for offset in (222, 170, 120, 54, 0)]
    for x, header in zip(right, headers, strict=True):
        for line, word in enumerate(header.split()):
            parts.append(_label(x, top + 22 + 14 * line, word, 12, SOFT, anchor="end"))
    for index, (name, token) in enumerate(rows):
        y = top + 62 + 22 * index
        color = COLORS[branches[token]] if branches[token] else INK
        parts.append(f'<path d="M{left} {y - 16}H{WIDTH - MARGIN}" stroke="{RULE}"/>')
        parts.append(_label(left, y, f"{token}  {name}", 14, color))
        values = layout.as_tensor()[:, token].tolist()
        hides = values[1] < values[2]
        shown = [str(value) if hides or place not in (1, 2) else "–" for place, value in enumerate(values)]
        parts += [
            _label(x, y, value.replace("-", "−"), 14, anchor="end")
            for x, value in zip(right, shown, strict=True)
        ]
    for line, text in enumerate(
        ("q sees k if k ≤ q < sequence end", "and not hidden from ≤ q < hidden until")
    ):
        parts.append(_label(left, PANEL_TOP + SIDE + 26 + 22 * line, text, 14, SOFT))
    return parts


def _cells(shown: Tensor) -> str:
    """An SVG path of the true cells of a bool [T, T], one subpath for each run within a row."""
    runs = []
    for row, cells in enumerate(shown.tolist()):
        column = 0
        for is_shown, run in groupby(cells):
            length = len(list(run))
            if is_shown:
                runs.append(f"M{column} {row}h{length}v1h-{length}z")
            column += length
    return "".join(runs)


def _tiles(counts: Tensor, indices: Tensor) -> list[tuple[int, int]]:
    """(query block, key block) of the listed tiles."""
    return [
        (row, column)
        for row, count in enumerate(counts[0, 0].tolist())
        for column in indices[0, 0, row, :count].tolist()
    ]


def _box(x: float, y: float, wide: float, high: float, fill: str, *, radius: float = 0) -> str:
    corners = f' rx="{radius:g}"' if radius else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{fill}"{corners}/>'


def _label(
    x: float, y: float, text: str, size: int, color: str = INK, *, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
