"""Texts in the code can be read where they stand: none leans on the one above it or on a page that is not there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT
from tests.support.sizes import GROUPS, source_files

LEANING = re.compile(r"(Of|The same|See|Also|As above)\b")
PAGE = re.compile(r"(?<![\w*/.])(?:[\w.-]+/)*[A-Z]\w*\.md\b")
GIVEN_WITH_MODELS = {"README.base.md", "USE_POLICY.md"}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every text that stands as a statement: docstrings, and those below a constant or field."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Expr(value=ast.Constant(value=str() as text)):
                yield node.lineno, text


def test_a_docstring_says_what_it_is_about() -> None:
    python = [path for path in {*source_files("Python"), *source_files("tests")} if path.suffix == ".py"]
    leaning = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted(python)
        for line, text in texts(path)
        if LEANING.match(text.strip())
    ]
    assert leaning == []


def test_the_pages_that_the_code_cites_are_there() -> None:
    cited = {
        (page, path)
        for path in {path for group in GROUPS for path in source_files(group)} - {Path(__file__)}
        for page in PAGE.findall(path.read_text(encoding="utf-8"))
        if page not in GIVEN_WITH_MODELS
    }
    assert any(page == "cuda_ext/README.md" for page, _ in cited)
    missing = [
        f"{path.relative_to(ROOT)}: {page}"
        for page, path in sorted(cited)
        if not (ROOT / page).is_file() and not (path.parent / page).is_file()
    ]
    assert missing == []
