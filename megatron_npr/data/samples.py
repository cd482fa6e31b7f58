"""The file between stages 1 and 2: one accepted response a line, as text and as canonical token ids.

npr sample ──► samples.jsonl (SftSample a line) ──► npr stage2
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npr.data.packing import TrainSample
from megatron_npr.runtime.format_version import CURRENT, FORMAT_VERSION, Kind, check_format
from megatron_npr.runtime.json_lines import read_json_lines
from megatron_npr.runtime.whole_file import write_whole
from npr_engine.language.vocabulary import Vocabulary
from npr_ext.errors import UserError

KIND: Kind = "samples file"


@dataclass(frozen=True)
class SftSample:
    """A response that was right and valid. Token ids are canonical (npr_engine.language), forced text included."""

    problem_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    text: str

    def train_sample(self) -> TrainSample:
        """All assistant tokens carry loss."""
        return TrainSample.whole(np.array(self.prompt_ids, np.int32), np.array(self.response_ids, np.int32))


def write_samples(path: Path, samples: Iterable[SftSample]) -> None:
    """Write the file whole or not at all."""
    lines = (json.dumps({FORMAT_VERSION: CURRENT[KIND], **asdict(sample)}) + "\n" for sample in samples)
    write_whole(path, "".join(lines))


def read_samples(path: Path, vocabulary: Vocabulary) -> list[SftSample]:
    """Read the file; UserError names file and line of a sample that is malformed or of another vocabulary."""
    if not path.is_file():
        raise UserError(f"no samples file {path}: run `npr sample` first or set sft.data")
    samples = [_sample_of(record, place, vocabulary) for place, record in read_json_lines(path)]
    if not samples:
        raise UserError(f"{path} holds no samples: run `npr sample` with more trials or a better model")
    return samples


def _sample_of(record: Any, place: str, vocabulary: Vocabulary) -> SftSample:
    try:
        if isinstance(record, dict):
            check_format(KIND, place, record.pop(FORMAT_VERSION, None))
        sample = SftSample(**record)
    except TypeError:
        raise UserError(f"{place}: expected the fields problem_id, prompt_ids, response_ids, text") from None
    for name in ("prompt_ids", "response_ids"):
        ids = getattr(sample, name)
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise UserError(f"{place}: {name} has to be a non-empty list of token ids")
        strange = next((token for token in ids if not vocabulary.has(token)), None)
        if strange is not None:
            raise UserError(
                f"{place}: {name} holds {strange}, no token id of this model's tokenizer ({vocabulary.size} ids): the samples "
                "are of another tokenizer, run `npr sample` with a model of this one"
            )
    return sample
