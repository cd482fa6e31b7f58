"""The file between stages 1 and 2: one accepted response a line, as text and as canonical token ids.

npr sample ──► samples.jsonl (SftSample a line) ──► npr stage2
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_npr.format_version import CURRENT, FORMAT_VERSION, Kind, check_format
from megatron_npr.packing import TrainSample
from megatron_npr.whole_file import write_whole
from npr_ext.errors import UserError

KIND: Kind = "samples file"


@dataclass(frozen=True)
class SftSample:
    """A response that was right and valid. Token ids are the canonical ones of FORMAT.md, forced text included."""

    problem_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    text: str

    def train_sample(self) -> TrainSample:
        """All assistant tokens carry loss."""
        count = len(self.response_ids)
        return TrainSample(
            prompt_ids=np.array(self.prompt_ids, np.int32),
            response_ids=np.array(self.response_ids, np.int32),
            trained=np.ones(count, np.bool_),
            old_log_probs=np.zeros(count, np.float32),
        )


def write_samples(path: Path, samples: Iterable[SftSample]) -> None:
    """Write the file whole or not at all."""
    lines = (json.dumps({FORMAT_VERSION: CURRENT[KIND], **asdict(sample)}) + "\n" for sample in samples)
    write_whole(path, "".join(lines))


def read_samples(path: Path) -> list[SftSample]:
    """Read the file; UserError names file and line of a malformed one."""
    if not path.is_file():
        raise UserError(f"no samples file {path}: run `npr sample` first or set sft.data")
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        samples.append(_sample_of(line, f"{path}:{number}"))
    if not samples:
        raise UserError(f"{path} holds no samples: run `npr sample` with more trials or a better model")
    return samples


def _sample_of(line: str, place: str) -> SftSample:
    try:
        record = json.loads(line)
        if isinstance(record, dict):
            check_format(KIND, place, record.pop(FORMAT_VERSION, None))
        sample = SftSample(**record)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except TypeError:
        raise UserError(f"{place}: expected the fields problem_id, prompt_ids, response_ids, text") from None
    for name in ("prompt_ids", "response_ids"):
        ids = getattr(sample, name)
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise UserError(f"{place}: {name} has to be a non-empty list of token ids")
    return sample
