"""A file is written whole or stays as it was."""

from pathlib import Path

import pytest

from megatron_npr.runtime.whole_file import whole_file, write_whole


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "first")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.writelines(f"{1 / number}" for number in (1, 0))
    assert path.read_text() == "first"
    with whole_file(path) as file:
        file.write("sec")
        assert path.read_text() == "first"
        file.write("ond")
    assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [("file.txt", "second")]
