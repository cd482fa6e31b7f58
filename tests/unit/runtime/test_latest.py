"""`latest` names the last of a folder's runs or checkpoints, and follows the folder when that is moved."""

from pathlib import Path

import pytest

from megatron_npr.runtime.latest import latest, point_to


def test_latest_is_what_was_pointed_to_last_wherever_the_folder_lies(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for name in ("first", "second"):
        point_to(tmp_path / "runs" / name)
    assert latest(tmp_path / "runs") == tmp_path / "runs" / "second"
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    assert latest(moved) == moved / "second"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_an_empty_or_strange_file_names_nothing_that_is_there(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(content)
    named = latest(tmp_path)
    assert named is None or not named.exists()
