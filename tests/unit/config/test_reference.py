"""configs/README.md holds the schema's own tables of keys."""

from megatron_npr.config import keys
from megatron_npr.config.reference import COMMANDS, reference
from tests.support.places import CONFIGS


def test_the_page_of_configurations_has_every_key_as_the_schema_says_it() -> None:
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert page.endswith(reference()), "print them again: python -m megatron_npr.config.reference"


def test_every_key_of_every_command_is_a_row_of_its_section() -> None:
    sections = {part.partition("]")[0]: part for part in reference().split("### [")[1:]}
    for cls in COMMANDS.values():
        for key in keys(cls):
            section, name = key.name.split(".")
            assert f"\n| {name} | " in sections[section], key.name
