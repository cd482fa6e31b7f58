"""The documents beside the code hold together: links resolve, examples run, lines are short, and the first questions are
answered near the top."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.places import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TOP = ROOT / "README.md"


def readmes() -> list[Path]:
    """Those of the project; not of what is installed, built or written by runs."""
    others = {"runs", "build", "node_modules"}
    return [
        path
        for path in sorted(ROOT.rglob("README.md"))
        if not any(part in others or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def links(page: Path) -> list[str]:
    """What a page links to within the project, outside of blocks of code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?)\s*$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


@pytest.mark.parametrize("page", readmes(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert [link for link in links(page) if broken(page, link)] == []


def pages_within(hops: int) -> set[Path]:
    """Pages that a reader of the top page reaches by as many links."""
    reached = {TOP}
    for _ in range(hops):
        reached |= {
            (page.parent / link.partition("#")[0]).resolve()
            for page in list(reached)
            if page.suffix == ".md"
            for link in links(page)
        }
    return reached


@pytest.mark.parametrize("page", readmes(), ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_and_cells_can_be_read_in_a_terminal(page: Path) -> None:
    """At most 140 characters a line of text, 120 a cell of a table; 150 lines for the page that comes first."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert page != TOP or len(lines) <= 150
    long = [line for line in lines if not line.startswith("|") and len(line) > 140]
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in re.split(r"(?<!\\)\|", line)]
    assert [*long, *(cell for cell in cells if len(cell) > 120)] == []


def examples() -> list[str]:
    """The blocks of Python on all pages."""
    return [
        code
        for page in readmes()
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    ]


@pytest.mark.parametrize("code", examples(), ids=lambda code: code.split("\n")[0])
def test_an_example_runs_as_it_stands_in_the_project_folder(
    code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_engines_page_has_an_example() -> None:
    assert any("engine.generate" in code for code in examples())


def test_first_questions_are_answered_within_two_hops_of_the_top_page() -> None:
    page = ROOT / "tests" / "README.md"
    section = page.read_text(encoding="utf-8").split("## First questions")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) >= 10
    near = pages_within(2)
    for row in rows:
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(row)]
        assert targets and set(targets) <= near, row
