"""`make check` runs the tests of a changed file that no module imports: pages, configurations, scripts."""

from pathlib import Path

import pytest

from tests.support.changed import BY_FOLDER, reached, reading
from tests.support.places import ROOT


@pytest.mark.parametrize(
    "file, test",
    [
        ("README.md", "tests/unit/repository/test_readmes.py"),
        ("configs/README.md", "tests/unit/config/test_reference.py"),
        ("configs/32b-4node/stage3.toml", "tests/unit/config/test_shipped_files.py"),
        ("launch/stage1.sh", "tests/unit/launch/test_launch.py"),
        ("megatron_npr/repairs/README.md", "tests/unit/repairs/test_repairs.py"),
        ("megatron_npr/rl/losses.py", "tests/unit/rl/test_losses.py"),
        ("megatron_npr/rl/losses.py", "tests/unit/repository/test_sizes.py"),
    ],
)
def test_a_changed_file_reaches_the_test_that_reads_it(file: str, test: str) -> None:
    assert (ROOT / file).is_file() and (ROOT / test).is_file()
    assert {test, str(Path(test).parent)} & {*reached([file]), *reading([file])}


def test_nothing_changed_runs_nothing() -> None:
    assert reading([]) == reached([]) == []


def test_the_folders_are_there() -> None:
    assert all((ROOT / name).is_dir() for pair in BY_FOLDER.items() for name in (pair[0], *pair[1]))
