"""A second `npr demo` leaves the first one's folder as it is, and says where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_npr.demo.run import run_folder
from npr_ext.errors import UserError


def test_a_second_demo_leaves_the_first_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_folder(tmp_path, 1, resume=False)
    assert capsys.readouterr().out == ""
    (first / "work").write_text("done")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    second = run_folder(tmp_path, 2, resume=False)
    assert second != first
    assert (
        f"the last demo stays in {first}; to continue it write {first.name} into" in capsys.readouterr().out
    )
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert run_folder(tmp_path, None, resume=True) == second
    (tmp_path / "latest").write_text(first.name)
    assert run_folder(tmp_path, None, resume=True) == first


def test_a_pointer_to_no_demo_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("gone\n")
    with pytest.raises(UserError, match="names gone, which is no demo"):
        run_folder(tmp_path, None, resume=True)
