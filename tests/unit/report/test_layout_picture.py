"""The picture of the layout: it is the shipped one, and it shows what the layout says."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import megatron_npr
from megatron_npr.cli import main
from megatron_npr.report.layout_picture import (
    BLOCK,
    COLORS,
    FORCED,
    FULL,
    HIDDEN,
    LANE,
    MONO,
    PARTIAL,
    draw,
    small_example,
)

ASSET = Path(megatron_npr.__file__).parent / "assets" / "layout.svg"
SVG = "{http://www.w3.org/2000/svg}"


def pairs_painted(color: str) -> int:
    """Cells of the dense mask in one colour: the sum of the lengths of its runs."""
    paths = [path for path in ElementTree.fromstring(draw()).iter(f"{SVG}path") if path.get("fill") == color]
    return sum(int(run) for path in paths for run in re.findall(r"h(\d+)v1", path.attrib["d"]))


def boxes(*colors: str) -> int:
    """Rectangles in one of the colours."""
    return sum(box.get("fill") in colors for box in ElementTree.fromstring(draw()).iter(f"{SVG}rect"))


def test_the_command_draws_the_shipped_picture_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "layout.svg"
    assert main(["draw", "layout", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == ASSET.read_bytes(), f"after a change run: npr draw layout --out {ASSET}"


def test_a_folder_in_place_of_the_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draw", "layout", "--out", str(tmp_path)]) == 2
    assert "is a folder: name a file" in capsys.readouterr().err


def test_every_pair_of_the_dense_mask_is_painted_once() -> None:
    layout = small_example().layout
    visible, tokens = layout.visible_pairs(), layout.num_tokens
    assert sum(pairs_painted(color) for color in COLORS) == visible
    assert pairs_painted(HIDDEN) == tokens * (tokens + 1) // 2 - visible


def test_every_tile_that_holds_a_visible_pair_is_painted() -> None:
    layout = small_example().layout
    blocks = layout.num_tokens // BLOCK
    seen = layout.visible().view(blocks, BLOCK, blocks, BLOCK).sum((1, 3))
    legend = 1
    assert boxes(FULL) == (seen == BLOCK * BLOCK).sum() + legend
    assert boxes(PARTIAL) == ((seen > 0) & (seen < BLOCK * BLOCK)).sum() + legend


def test_every_token_stands_in_the_text_and_in_the_timeline() -> None:
    example = small_example()
    picture = ElementTree.fromstring(draw())
    written = [text.text for text in picture.iter(f"{SVG}text") if text.get("font-family") == MONO]
    cells = [box for box in picture.iter(f"{SVG}rect") if box.get("height") == f"{LANE:.1f}"]
    assert tuple(written) == example.words
    assert len(cells) == example.layout.num_tokens
    assert sum(cell.get("fill") in FORCED for cell in cells) == sum(example.forced) == 5 * 3 + 2 * 2


def test_siblings_start_at_one_position_and_the_join_behind_the_longest() -> None:
    layout = small_example().layout
    branches, positions = layout.branch_ids.tolist(), layout.position_ids.tolist()
    starts = {branch: positions[branches.index(branch)] for branch in (1, 2, 3)}
    assert len(set(starts.values())) == 1
    join = next(i for i in range(branches.index(3), len(branches)) if branches[i] == 0)
    assert positions[join] == max(positions[:join]) + 1
