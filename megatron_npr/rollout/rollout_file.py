"""Rollouts on disk: one JSON object a line, everything the engine said about a response."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npr.runtime.format_version import CURRENT, FORMAT_VERSION, Kind, check_format
from megatron_npr.runtime.json_lines import read_json_lines
from megatron_npr.runtime.whole_file import whole_file
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.rollout import Rollout
from npr_ext.errors import UserError

KIND: Kind = "rollouts file"
ARRAYS = {
    "prompt_ids": np.int32,
    "token_ids": np.int32,
    "logprobs": np.float32,
    "sampler_logprobs": np.float32,
    "forced": np.bool_,
    "branch_ids": np.int32,
    "decode_steps": np.int32,
    "positions": np.int32,
}
SCALARS = ("request_id", "finish_reason", "branching", "constrained", "weights_version")


def to_record(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON data; log-probs that are NaN (forced tokens) become null."""
    fields = vars(rollout)
    record = {name: fields[name] for name in SCALARS}
    for name, kind in ARRAYS.items():
        values = fields[name].tolist()
        record[name] = (
            [None if value != value else value for value in values] if kind is np.float32 else values
        )
    return record


def from_record(record: dict[str, Any]) -> Rollout:
    """The inverse of `to_record`."""
    fields: dict[str, Any] = {name: record[name] for name in SCALARS}
    fields |= {name: np.array(record[name], dtype=kind) for name, kind in ARRAYS.items()}
    return Rollout(**fields)


def pieces(rollout: Rollout, vocabulary: Vocabulary) -> tuple[str, ...]:
    """The text of every response token; a byte of a longer character shows as a replacement mark."""
    return tuple(vocabulary.pieces[token].decode(errors="replace") for token in rollout.token_ids.tolist())


def write_rollouts(path: Path, rollouts: Iterable[Rollout], vocabulary: Vocabulary) -> None:
    """Write a JSONL file with the tokens' texts beside their ids, in one piece or not at all."""
    with whole_file(path) as file:
        file.writelines(_lines(rollouts, vocabulary))


def append_rollouts(path: Path, rollouts: Iterable[Rollout], vocabulary: Vocabulary) -> None:
    """Extend such a file; the rollouts are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_lines(rollouts, vocabulary))
        file.flush()
        os.fsync(file.fileno())


def keep_rollouts(path: Path, count: int) -> None:
    """Leave the first `count` lines of such a file, if it is there: a crash may have left more than what is accounted for."""
    if path.is_file():
        with path.open("r+b") as file:
            end = sum(len(line) for line in itertools.islice(file, count))
            file.truncate(end)


def _lines(rollouts: Iterable[Rollout], vocabulary: Vocabulary) -> Iterator[str]:
    for rollout in rollouts:
        record = {
            FORMAT_VERSION: CURRENT[KIND],
            **to_record(rollout),
            "pieces": pieces(rollout, vocabulary),
        }
        yield json.dumps(record) + "\n"


def read_rollouts(path: Path) -> list[Rollout]:
    """Read a JSONL file; UserError names the file and the line that is not a rollout."""
    return [rollout for rollout, _ in read_with_pieces(path)]


def read_with_pieces(path: Path) -> list[tuple[Rollout, tuple[str, ...]]]:
    """Rollouts with the texts of their tokens."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `npr eval` and `npr demo` write rollouts")
    rollouts = []
    for place, record in read_json_lines(path):
        try:
            check_format(KIND, place, record.get(FORMAT_VERSION))
            rollouts.append((from_record(record), tuple(record["pieces"])))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{place}: not a rollout: {type(error).__name__} {error}") from None
    return rollouts
