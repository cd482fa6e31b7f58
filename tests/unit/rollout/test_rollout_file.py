from pathlib import Path

import numpy as np
import pytest

from megatron_npr.rollout.rollout_file import (
    append_rollouts,
    from_record,
    keep_rollouts,
    read_rollouts,
    to_record,
    write_rollouts,
)
from npr_engine.language.vocabulary import Vocabulary
from npr_ext import TagIds
from npr_ext.errors import UserError
from tests.support.report_sample import rollout


def vocabulary() -> Vocabulary:
    _, pieces = rollout()
    extra = [f"<tag {index}>" for index in range(9)]
    return Vocabulary([*pieces, *extra], len(pieces), TagIds(*range(len(pieces) + 1, len(pieces) + 9)))


def test_a_rollout_reads_back_equal(tmp_path: Path) -> None:
    made, _ = rollout()
    write_rollouts(tmp_path / "deep" / "rollouts.jsonl", [made, made], vocabulary())
    back = read_rollouts(tmp_path / "deep" / "rollouts.jsonl")
    assert len(back) == 2
    for name, value in vars(made).items():
        np.testing.assert_array_equal(vars(back[1])[name], value)
        assert np.asarray(vars(back[1])[name]).dtype == np.asarray(value).dtype


def test_a_file_that_grows_forgets_what_a_crash_left_behind_its_accounted_lines(tmp_path: Path) -> None:
    path, made = tmp_path / "rollouts.jsonl", rollout()[0]
    keep_rollouts(path, 0)
    assert not path.exists()
    append_rollouts(path, [made, made], vocabulary())
    accounted = path.read_bytes()
    append_rollouts(path, [made], vocabulary())
    path.write_bytes(path.read_bytes()[:-5])
    keep_rollouts(path, 2)
    assert path.read_bytes() == accounted and len(read_rollouts(path)) == 2


def test_a_record_holds_no_nan() -> None:
    made, _ = rollout()
    record = to_record(made)
    assert record["logprobs"].count(None) == int(made.forced.sum())
    assert np.isnan(from_record(record).logprobs).sum() == made.forced.sum()


def test_a_line_that_is_no_rollout_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [rollout()[0]], vocabulary())
    path.write_text(path.read_text() + '{"request_id": 1}\n')
    with pytest.raises(UserError, match=r"rollouts\.jsonl:2: not a rollout"):
        read_rollouts(path)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rollouts(tmp_path / "absent.jsonl")
