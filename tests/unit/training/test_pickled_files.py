"""What the metadata of a checkpoint may name, whatever Python has written it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_npr.training.pickled_files import COMMON, METADATA, check_pickled_files
from npr_ext.errors import UserError


class Attribute:
    """Pickled as `getattr(owner, name)`, as Python 3.11.3 and older (Debian 12's) pickle a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self._called = (owner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._called


def checkpoint(folder: Path, held: object) -> Path:
    torch.save({}, folder / COMMON)
    (folder / METADATA).write_bytes(pickle.dumps([held]))
    return folder


@pytest.mark.parametrize("member", WriteItemType)
def test_a_member_of_an_enumeration_may_be_an_attribute_of_it(member: WriteItemType, tmp_path: Path) -> None:
    held = Attribute(WriteItemType, member.name)
    assert pickle.loads(pickle.dumps(held)) is member
    check_pickled_files(checkpoint(tmp_path, held))


@pytest.mark.parametrize(
    ("owner", "name"), [(WriteItemType, "__init_subclass__"), (Metadata, "__init__"), (torch.Size, "mro")]
)
def test_no_other_attribute_may(owner: type, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{METADATA} asks for attribute '{name}'.*may be hostile"):
        check_pickled_files(checkpoint(tmp_path, Attribute(owner, name)))
