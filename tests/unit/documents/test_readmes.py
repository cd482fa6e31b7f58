"""The documents: every link leads somewhere, and the tables of keys are the schema's own."""

import re
from pathlib import Path

import pytest

from megatron_npr.config.reference import reference
from tests.support.places import ROOT

READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, other marks left out."""
    headings = HEADING.findall(document.read_text())
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_package_and_folder_has_its_page() -> None:
    folders = {path.parent.name for path in READMES[1:]}
    assert folders == {"configs", "cuda_ext", "engine", "launch", "megatron_npr", "tests"}


@pytest.mark.parametrize("document", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link} is not there"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}: no such heading"


@pytest.mark.parametrize("document", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_that_a_page_names_is_there(document: Path) -> None:
    rooms = [ROOT, document.parent, *(ROOT / place for place in ("megatron_npr", "engine", "cuda_ext", "engine/npr_engine"))]
    rooms += [ROOT / "cuda_ext/npr_ext", document.parent / "npr_ext", document.parent / "npr_engine"]
    for path in re.findall(r"`([\w/]+/[\w/]+\.(?:py|cpp|cu|h|sh|toml))`", document.read_text()):
        assert any((room / path).exists() for room in rooms), f"{document.name} names {path}, which is not there"


def test_the_keys_of_the_configuration_are_those_of_the_schema() -> None:
    text = (ROOT / "configs/README.md").read_text()
    assert text.endswith(reference()), "print them again: python -m megatron_npr.config.reference"
