"""`npr convert`: a model from elsewhere as a Hugging Face folder whose tokenizer holds the eight tags.

GGUF file ───────────► GGUFFile ──► tokenizer with tags ──► tensors, shard by shard ──► folder, whole or not at all
Hugging Face folder ─► HuggingFaceWeights ──► tags on request ─┘
checkpoint, run ─────► see checkpoint_export.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_npr.gguf_file import GGUFFile, find_gguf
from megatron_npr.huggingface import (
    HuggingFaceWeights,
    copy_description,
    load_tokenizer,
    read_config_json,
    read_model_config,
)
from megatron_npr.model_folder import check_target, whole_folder, write_json, write_tensors
from megatron_npr.tag_tokens import append_tags, rows_with_tags, with_tag_rows
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
        ids = f"ids {', '.join(map(str, self.new_tags))}" if self.new_tags else "none"
        precision = str(self.dtype).removeprefix("torch.")
        return f"{self.folder}: {self.num_parameters:,} parameters in {precision}, tags added: {ids}"


SAFETENSORS_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def convert_folder(
    source: Path, target: Path, *, add_tags: bool, dtype: torch.dtype | None = None, force: bool = False
) -> Conversion:
    """Write a Hugging Face folder from another: weights in `dtype` (none = as they are), tokenizer, chat template.

    With `add_tags` each tag that the tokenizer lacks gets an id behind its last one; the vocabulary matrices keep their
    spare rows and grow only where these do not suffice. UserError for a model that is none of ours.
    """
    check_target(target, replace=force)  # before the work
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{source} lies in {target}, which would be replaced: choose another folder")
    model_config, config = read_model_config(source), read_config_json(source)
    tokenizer = load_tokenizer(source) if add_tags else None
    pieces = append_tags(tokenizer) if add_tags else {}
    rows = rows_with_tags(model_config.vocab_size, pieces)
    with HuggingFaceWeights(source, model_config) as weights, whole_folder(target, replace=force) as folder:
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name in weights.names:
            shape, kind = weights.shape_and_type(name)
            if kind not in SAFETENSORS_TYPES:
                raise UserError(
                    f"{source}: {name} is stored as {kind}: convert the model before it was quantised"
                )
            shapes[name] = (rows, *shape[1:]) if name in VOCABULARY_MATRICES else shape
            dtypes[name] = dtype or SAFETENSORS_TYPES[kind]

        def read(name: str) -> Tensor:
            weight = weights.read(name)
            return (with_tag_rows(weight, pieces) if name in VOCABULARY_MATRICES else weight).to(dtypes[name])

        copy_description(source, folder)
        written = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
        write_json(folder / "config.json", {**config, "vocab_size": rows, **written})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
            Vocabulary.from_tokenizer(load_tokenizer(folder))  # what the engine will ask of it
        sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        write_tensors(folder, sizes, read)
    most = max(dtypes.values(), key=list(dtypes.values()).count)
    return Conversion(target, most, sum(map(math.prod, shapes.values())), tuple(pieces))


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
