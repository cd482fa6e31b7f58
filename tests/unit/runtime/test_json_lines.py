"""Every reader of lines: what is one line, what is text, and one line of error for the rest."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.data.problem_file import load_problems
from megatron_npr.data.samples import read_samples
from megatron_npr.monitoring.metrics import read_metrics
from megatron_npr.rollout.rollout_file import ARRAYS, read_with_pieces
from megatron_npr.runtime.json_lines import read_json_lines, whole_lines
from npr_engine.testing import VOCABULARY
from npr_ext.errors import UserError

ODD = "a\u2028b\u2029c\x85d\u00a0e\x1cf\ufeff\U0001f600"
Reader = Callable[[Path], list[str]]


def sample(text: str) -> dict[str, Any]:
    return {"problem_id": "one", "prompt_ids": [1, 2], "response_ids": [3], "text": text}


def rollout(text: str) -> dict[str, Any]:
    scalars = {"finish_reason": "eos", "branching": False, "constrained": False, "weights_version": 0}
    return {"request_id": text, **scalars, **{name: [1] for name in ARRAYS}, "pieces": [text]}


READERS: dict[str, tuple[Callable[[str], dict[str, Any]], Reader]] = {
    "samples.jsonl": (sample, lambda path: [item.text for item in read_samples(path, VOCABULARY)]),
    "rollouts.jsonl": (rollout, lambda path: [pieces[0] for _, pieces in read_with_pieces(path)]),
    "problems.jsonl": (
        lambda text: {"id": text, "question": text, "answer": "1"},
        lambda path: [problem.question for problem in load_problems(path)],
    ),
    "metrics.jsonl": (
        lambda text: {"step": 1, "text": text},
        lambda path: [r["text"] for r in read_metrics(path)],
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["newline", "carriage return"])
def test_separators_inside_of_strings_end_no_line(name: str, mark: str, end: str, tmp_path: Path) -> None:
    record, read = READERS[name]
    texts = [ODD, f"{ODD}{ODD}"]
    lines = [json.dumps(record(text), ensure_ascii=False) + end for text in texts]
    (tmp_path / name).write_bytes((mark + "".join(lines)).encode())
    assert read(tmp_path / name) == texts


BROKEN = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "not JSON"),
    "half a line": (b'{"text": ', "not JSON"),
    "two values": (b"{} {}", "not JSON"),
    "nested too deeply": (b"[" * 200_000, "JSON that cannot be read"),
    "a number of thousands of digits": (b'{"step": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_line_that_cannot_be_read_is_named(name: str, kind: str, tmp_path: Path) -> None:
    record, read = READERS[name]
    line, message = BROKEN[kind]
    (tmp_path / name).write_bytes(json.dumps(record("a")).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=f"{name}:2: {message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["samples.jsonl", "rollouts.jsonl", "problems.jsonl"])
def test_an_empty_line_is_named(name: str, tmp_path: Path) -> None:
    record, read = READERS[name]
    (tmp_path / name).write_text(json.dumps(record("a")) + "\n\n" + json.dumps(record("b")) + "\n")
    with pytest.raises(UserError, match=f"{name}:2: empty line"):
        read(tmp_path / name)


@pytest.mark.parametrize("field", ["prompt_ids", "response_ids"])
@pytest.mark.parametrize("token", [-1, VOCABULARY.size, 151_643, 1 << 31, 1 << 70])
def test_samples_of_another_tokenizer_are_named(field: str, token: int, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(sample("a")) + "\n" + json.dumps({**sample("a"), field: [1, token]}) + "\n")
    with pytest.raises(UserError, match=rf"samples\.jsonl:2: {field} holds {token}, no token id"):
        read_samples(path, VOCABULARY)


@pytest.mark.parametrize("ids", [[], [True], [1.0], ["1"], None, {"1": 1}])
def test_ids_of_another_type_are_named(ids: object, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({**sample("a"), "response_ids": ids}) + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl:1: response_ids has to be"):
        read_samples(path, VOCABULARY)


@given(st.lists(st.text()))
def test_whatever_is_written_is_read(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        path.write_bytes(b"".join(json.dumps(text, ensure_ascii=False).encode() + b"\n" for text in texts))
        assert [value for _, value in read_json_lines(path)] == texts == whole_lines(path)


def test_a_last_line_that_a_crash_has_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    assert whole_lines(tmp_path / "lines") == [{"step": 1}, {"step": 2}]


def zipped(text: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", text)
    return file.getvalue()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("pack", "what"),
    [
        (gzip.compress, "compressed (gzip), not text: unpack it with gunzip"),
        (bz2.compress, "compressed (bzip2), not text: unpack it with bunzip2"),
        (lzma.compress, "compressed (xz), not text: unpack it with unxz"),
        (zipped, "a zip archive, not text: unpack it"),
        (lambda text: b"PAR1" + text, "a Parquet file, not text: write it as JSON lines"),
    ],
)
def test_a_packed_file_is_called_one(
    name: str, pack: Callable[[bytes], bytes], what: str, tmp_path: Path
) -> None:
    record, read = READERS[name]
    (tmp_path / name).write_bytes(pack(json.dumps(record("a")).encode() + b"\n"))
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} is {what}")


def test_a_table_of_problems_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text("question,answer\n1 + 1,2\n")
    with pytest.raises(UserError, match=r"a\.CSV is a table: write it as JSON lines"):
        load_problems(tmp_path / "a.CSV")
