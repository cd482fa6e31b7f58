"""`npr convert`: a model from elsewhere as a Hugging Face folder whose tokenizer holds the eight tags.

GGUF file ──► GGUFFile ──► tokenizer with tags ──► tensors, shard by shard ──► folder, whole or not at all
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_npr.gguf_file import GGUFFile, find_gguf
from megatron_npr.huggingface import load_tokenizer
from megatron_npr.model_folder import check_target, whole_folder, write_json, write_tensors
from megatron_npr.tag_tokens import with_tag_rows
from npr_engine.vocabulary import Vocabulary
from npr_ext.errors import UserError

VOCABULARY_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Conversion:
    """What was written. `new_tags` are the ids that carry a tag the source did not have."""

    folder: Path
    dtype: torch.dtype
    num_parameters: int
    new_tags: tuple[int, ...]

    def __str__(self) -> str:
        ids = f"ids {', '.join(map(str, self.new_tags))}" if self.new_tags else "none (all were there)"
        precision = str(self.dtype).removeprefix("torch.")
        return f"{self.folder}: {self.num_parameters:,} parameters in {precision}, tags added: {ids}"


def convert_gguf(
    source: str, target: Path, *, dtype: torch.dtype = torch.float32, force: bool = False
) -> Conversion:
    """Write a Hugging Face folder from a GGUF file (or a name of `SHIPPED`).

    A tag that the tokenizer lacks takes a spare special id, and its rows become the mean of its former pieces.
    UserError where the file cannot be read, is of another architecture, or the target is taken.
    """
    path = find_gguf(source)
    check_target(target, replace=force)  # before the work
    if path.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{path} lies in {target}, which would be replaced: choose another folder")
    model = GGUFFile(path)
    pieces = model.tokenizer.tag_pieces()

    def read(name: str) -> Tensor:
        weight = model.read(name)
        return (with_tag_rows(weight, pieces) if name in VOCABULARY_MATRICES else weight).to(dtype)

    counts = {name: math.prod(shape) for name, shape in model.shapes.items()}
    with whole_folder(target, replace=force) as folder:
        write_json(folder / "config.json", {**model.config, "dtype": str(dtype).removeprefix("torch.")})
        roles = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(
            folder / "generation_config.json",
            {key: model.config[key] for key in roles if key in model.config},
        )
        write_json(folder / "tokenizer_config.json", model.tokenizer.settings())
        model.tokenizer.backend().save(str(folder / "tokenizer.json"))
        Vocabulary.from_tokenizer(load_tokenizer(folder))  # what the engine will ask of it
        write_tensors(folder, {name: count * dtype.itemsize for name, count in counts.items()}, read)
    return Conversion(target, dtype, sum(counts.values()), tuple(pieces))
