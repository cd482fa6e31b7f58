"""Every file that a page or a comment of the C++ names is there: one that moved code has left behind misleads."""

import re
from pathlib import Path

import pytest

from tests.support.places import ROOT

FOLDERS = ("megatron_npr", "engine", "cuda_ext", "launch", "configs", "tests")
PAGES = [
    ROOT / "README.md",
    *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")),
]
NAMED = re.compile(r"`((?:[\w.-]+/)*[\w-][\w.-]*\.(?:py|cpp|cu|h|sh|toml))`")
PACKAGES = ("", "megatron_npr", "engine", "engine/npr_engine", "cuda_ext", "cuda_ext/npr_ext")
WRITTEN_BY_A_RUN = {"config.toml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    """A name with a folder is a path from the page or a package; one without is a file somewhere below the page."""
    folders = [page.parent, *(ROOT / package for package in PACKAGES)]
    below = [page.parent] if page.parent != ROOT else [ROOT / folder for folder in FOLDERS]
    known = {path.name for folder in below for path in folder.rglob("*.*")}
    missing = [
        name
        for name in NAMED.findall(page.read_text(encoding="utf-8"))
        if not any((folder / name).is_file() for folder in folders)
        and not ("/" not in name and name in known | WRITTEN_BY_A_RUN)
    ]
    assert missing == []


def test_the_files_that_a_comment_of_the_extension_names_are_there() -> None:
    folders = [ROOT / package for package in PACKAGES]
    named = {
        name
        for path in (ROOT / "cuda_ext").rglob("*.*")
        if path.suffix in (".h", ".cpp", ".cu")
        for comment in re.findall(r"//.*", path.read_text(encoding="utf-8"))
        for name in re.findall(r"(?:[\w-]+/)+[\w-]+\.(?:py|md)\b", comment)
    }
    assert "npr_ext/layout/violations.py" in named
    assert [name for name in sorted(named) if not any((folder / name).is_file() for folder in folders)] == []


def test_names_are_found_with_and_without_a_folder() -> None:
    text = "`a.py`, `rl/losses.py`, `csrc/cuda/layout.cu`, `<name>_command.py`, `x.json`, plain.py"
    assert NAMED.findall(text) == ["a.py", "rl/losses.py", "csrc/cuda/layout.cu"]
