"""`npr convert`: a model from elsewhere as a Hugging Face folder whose tokenizer holds the eight tags.

GGUF file ───────────► GGUFFile ──► tokenizer with tags ──► tensors, shard by shard ──► folder, whole or not at all
Hugging Face folder ─► HuggingFaceWeights ──► tags on request ─┘
checkpoint, run ─────► see checkpoint_export.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_npr.hf.description import copy_description, set_dtype
from megatron_npr.hf.fp8_export import (
    SCALE_SUFFIX,
    quantization_config,
    quantize_blocks,
    quantized_names,
    require_modelopt,
    scale_shape,
)
from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.gguf.file import GGUFFile, find_gguf
from megatron_npr.hf.huggingface import (
    HuggingFaceWeights,
    load_tokenizer,
    read_config_json,
    read_model_config,
)
from megatron_npr.hf.model_folder import check_target, whole_folder, write_json, write_tensors
from megatron_npr.hf.tag_tokens import append_tags, rows_with_tags, with_tag_rows
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


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class _Target:
    """How a tensor is written: [shape] in `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert_folder(
    source: Path,
    target: Path,
    *,
    add_tags: bool = False,
    fp8: bool = False,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Conversion:
    """Write a Hugging Face folder from another: weights in `dtype` (none = as they are), tokenizer, chat template.

    With `add_tags` each tag that the tokenizer lacks gets an id behind its last one; the vocabulary matrices keep their
    spare rows and grow only where these do not suffice. With `fp8` the layers' projections become FP8 (see fp8_export.py).
    UserError for a model that is none of ours.
    """
    check_target(target, replace=force)  # before the work
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{source} lies in {target}, which would be replaced: choose another folder")
    if fp8:
        require_modelopt()
    model_config, config = read_model_config(source), read_config_json(source)
    tokenizer = load_tokenizer(source) if add_tags else None
    pieces = append_tags(tokenizer) if add_tags else {}
    rows = rows_with_tags(model_config.vocab_size, pieces)
    with HuggingFaceWeights(source, model_config) as weights, whole_folder(target, replace=force) as folder:
        targets = {name: _target_of(weights, name, rows, dtype) for name in weights.names}
        num_parameters = sum(math.prod(entry.shape) for entry in targets.values())
        projections = quantized_names(model_config) if fp8 else set()
        scales: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name in scales:
                return scales.pop(name)
            weight = weights.read(name)
            if name in projections:
                packed, scales[name + SCALE_SUFFIX] = quantize_blocks(weight)
                return packed
            return (with_tag_rows(weight, pieces) if name in VOCABULARY_MATRICES else weight).to(
                targets[name].dtype
            )

        written: dict[str, Any] = {}
        if fp8:
            written["quantization_config"] = quantization_config(targets)
            targets = _with_scales(targets, projections)
        copy_description(source, folder, new_tokens=add_tags)
        write_json(folder / "config.json", {**config, "vocab_size": rows, **written})
        if dtype is not None:
            set_dtype(folder, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
            read_vocabulary(folder, load_tokenizer(folder))  # what the engine will ask of it
        write_tensors(folder, {name: entry.nbytes for name, entry in targets.items()}, read)
    most = max(targets.values(), key=lambda entry: entry.nbytes).dtype
    return Conversion(target, torch.float8_e4m3fn if fp8 else most, num_parameters, tuple(pieces))


def _target_of(weights: HuggingFaceWeights, name: str, rows: int, dtype: torch.dtype | None) -> _Target:
    stored = weights.stored(name)
    shape = stored.shape
    if name in VOCABULARY_MATRICES:
        shape = (rows, *shape[1:])
    return _Target(shape, dtype or SAFETENSORS_TYPES[stored.format])


def _with_scales(targets: dict[str, _Target], projections: set[str]) -> dict[str, _Target]:
    """The tensors of a folder whose projections are FP8, each followed by its scales."""
    found: dict[str, _Target] = {}
    for name, entry in targets.items():
        if name in projections:
            found[name] = _Target(entry.shape, torch.float8_e4m3fn)
            found[name + SCALE_SUFFIX] = _Target(scale_shape(name, entry.shape), torch.float32)
        else:
            found[name] = entry
    return found


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
        read_vocabulary(folder, load_tokenizer(folder))  # what the engine will ask of it
        write_tensors(folder, {name: count * dtype.itemsize for name, count in counts.items()}, read)
    return Conversion(target, dtype, sum(counts.values()), tuple(pieces))
