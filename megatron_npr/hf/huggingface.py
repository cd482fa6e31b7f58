"""Models from and to Hugging Face folders: config.json and safetensors, nothing unpickled.

folder ──► read_model_config ──► HuggingFaceWeights.full(name) ──► shard ──► Megatron parameter
full Megatron weights ──► export_model ──► folder that transformers loads
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_npr.hf.description import copy_description, rename_card, set_dtype
from megatron_npr.hf.finite import check_finite
from megatron_npr.hf.model_folder import whole_folder, write_tensors
from megatron_npr.hf.tensor_files import Stored, TensorFiles, check_tensors
from megatron_npr.hf.tensor_names import huggingface_names, tensor_shapes
from megatron_npr.sharding.architecture import from_config
from megatron_npr.sharding.catalog import catalog
from megatron_npr.sharding.layouts import EngineLayout
from megatron_npr.sharding.model_files import read_object, refuse_pointer
from megatron_npr.sharding.weights import fuse_qkv, shard, split_qkv
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError

ONE_RANK = EngineLayout()
_COMPARED_ROWS = 8192
"""Rows of each of two vocabulary matrices that are in memory at a time, while they are compared."""


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; UserError where it is missing or malformed."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: name a Hugging Face folder")
    if not path.exists():
        raise UserError(f"{folder} has no config.json: name a Hugging Face folder")
    return read_object(path)


def read_context_length(folder: Path) -> int | None:
    """Positions that the model was made for; None where its config.json does not say. A stretched RoPE reaches further than
    the max_position_embeddings that people leave as it was."""
    config = read_config_json(folder)
    length = config.get("max_position_embeddings")
    scaling = read_model_config(folder).rope_scaling
    if not isinstance(length, int) or scaling is None:
        return length if isinstance(length, int) else None
    return max(length, round(scaling.factor * scaling.positions))


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder (Qwen3, Qwen3-MoE, Qwen2.5, Llama families)."""
    config = read_config_json(folder)
    if "quantization_config" in config:
        raise UserError(f"{folder} holds quantised weights: give the model that they were made from")
    return from_config(config, f"{folder}/config.json")


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer; UserError where there is none."""
    from transformers import AutoTokenizer  # slow to import; `npr --help` does without

    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder} has no tokenizer.json: name a Hugging Face folder with a fast tokenizer")
    refuse_pointer(path)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # what tokenizers raises for a damaged file is an Exception and nothing more
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}: its tokenizer cannot be read ({reason}): copy its files again") from error


class HuggingFaceWeights:
    """Lazy reader of a folder's safetensors: a tensor is read when asked for. Use as a context manager.

    The one way by which weights come in, so the one place that says what is wrong with them: UserError where tensors are
    missing, have no place in the model, are of another shape, quantised, or not finite.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder, self._config = folder, config
        self._files = TensorFiles(folder)
        self._wanted = tensor_shapes(config)
        check_tensors(folder, self._files.tensors, self._wanted, tied=config.tied_embeddings)

    def __enter__(self) -> HuggingFaceWeights:
        if self._config.tied_embeddings and "lm_head.weight" in self._files.tensors:
            self._check_tied()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    @property
    def names(self) -> list[str]:
        """All tensors of the model, layer by layer."""
        return list(self._wanted)

    def stored(self, name: str) -> Stored:
        """Shape and number format of a tensor, without reading it."""
        return self._files.tensors[name]

    def read(self, name: str) -> Tensor:
        """One tensor of the model."""
        tensor: Tensor = self._files.open(name).get_tensor(name)
        return check_finite(tensor, f"{self._folder}: {name}")

    def full(self, name: str) -> Tensor:
        """One full (unsharded) Megatron weight."""
        parts = [self.read(part) for part in huggingface_names(name)]
        if len(parts) == 3:
            return fuse_qkv(parts[0], parts[1], parts[2], self._config)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_tied(self) -> None:
        """UserError where the output matrix that is stored beside a tied embedding is another one."""
        names = ("model.embed_tokens.weight", "lm_head.weight")
        embedding, output = (self._files.open(name).get_slice(name) for name in names)
        for row in range(0, self._config.vocab_size, _COMPARED_ROWS):
            rows = slice(row, row + _COMPARED_ROWS)
            if not torch.equal(embedding[rows], output[rows]):
                raise UserError(
                    f"{self._folder}: tie_word_embeddings is true in config.json, but {names[1]} is not {names[0]}: set it "
                    f"to false if the model has an output matrix of its own, else remove {names[1]}"
                )


def read_engine_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    layout: EngineLayout = ONE_RANK,
    rank: int = 0,
) -> dict[str, Tensor]:
    """What `rank` of an engine replica holds of a folder's weights, by Megatron's names; all of them on one rank."""
    shards: dict[str, Tensor] = {}
    with HuggingFaceWeights(folder, config) as source:
        for name, weight in catalog(config).items():
            if weight.engine_holds(config.num_experts, layout, rank):
                part = shard(source.full(name), weight.kind.matrix, *weight.engine_cut(layout, rank))
                shards[name] = part.to(device, dtype)
    return shards


def export_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Full Megatron weights -> Hugging Face tensors, copies."""
    return {name: tensor.contiguous().clone() for name, tensor in named_tensors(weights, config)}


def named_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Full Megatron weights as (Hugging Face name, tensor), one by one; views of the weights where they can be."""
    for name in catalog(config):
        parts = huggingface_names(name)
        full = weights[name]
        if len(parts) == 3:
            pieces: tuple[Tensor, ...] = split_qkv(full, config)
        else:
            pieces = (full,) if len(parts) == 1 else full.chunk(2, dim=0)
        yield from zip(parts, pieces, strict=True)


def export_model(
    weights: Mapping[str, Tensor], config: ModelConfig, source: Path, target: Path, *, replace: bool = True
) -> None:
    """Write a folder that transformers loads: weights, and what describes `source` (see description.py).

    The folder appears whole; a model that stands there is replaced, if `replace`.
    """
    tensors = export_tensors(weights, config)
    with whole_folder(target, replace=replace) as folder:
        write_tensors(folder, {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__)
        copy_description(source, folder)
        set_dtype(folder, next(iter(tensors.values())).dtype)
        rename_card(folder)
