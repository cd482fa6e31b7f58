"""Every file that a page of the project names is there: a page that moved code has left behind misleads."""

import re
from pathlib import Path

import pytest

from tests.support.places import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|cu|h|sh|toml))`")
PACKAGES = ("", "megatron_npr", "engine", "engine/npr_engine", "cuda_ext", "cuda_ext/npr_ext")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    folders = [page.parent, *(ROOT / package for package in PACKAGES)]
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert any((folder / name).exists() for folder in folders), name
