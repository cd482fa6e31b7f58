"""Models from and to Hugging Face folders: config.json and safetensors, nothing unpickled.

folder ──► read_model_config ──► HuggingFaceWeights.full(name) ──► shard ──► Megatron parameter
full Megatron weights ──► export_model ──► folder that transformers loads
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_npr.architecture import from_config
from megatron_npr.model_folder import copy_files, whole_folder, write_tensors
from megatron_npr.resharding.catalog import catalog
from megatron_npr.weights import fuse_qkv, split_qkv
from npr_engine.model import ModelConfig
from npr_ext.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; UserError where it is missing or malformed."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: name a Hugging Face folder (model.path)")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: name a Hugging Face folder (model.path)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    return config


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder (Qwen3, Qwen3-MoE, Qwen2.5, Llama families)."""
    config = read_config_json(folder)
    if "quantization_config" in config:
        raise UserError(f"{folder} holds quantised weights: give the model that they were made from")
    return from_config(config, f"{folder}/config.json")


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer; UserError where there is none."""
    from transformers import AutoTokenizer  # slow to import; `npr --help` does without

    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json: name a Hugging Face folder with a fast tokenizer")
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


_DIRECT = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER_DIRECT = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_LAYER_FUSED = {
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


_EXPERTS = "mlp.experts.local_experts."
_EXPERT_PARTS = {"linear_fc1.weight": ("gate_proj", "up_proj"), "linear_fc2.weight": ("down_proj",)}


def huggingface_names(name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that make up one Megatron weight."""
    if name in _DIRECT:
        return (_DIRECT[name],)
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    if rest.startswith(_EXPERTS):
        expert, projection = rest.removeprefix(_EXPERTS).split(".", 1)
        at = f"model.layers.{layer}.mlp.experts.{expert}."
        return tuple(f"{at}{part}.weight" for part in _EXPERT_PARTS[projection])
    parts = _LAYER_FUSED.get(rest) or (_LAYER_DIRECT[rest],)
    return tuple(f"model.layers.{layer}.{part}" for part in parts)


class HuggingFaceWeights:
    """Lazy reader of a folder's safetensors: a tensor is read when asked for. Use as a context manager."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder, self._config, self._listed = folder, config, catalog(config)
        self._files: dict[str, Any] = {}
        self._file_of = self._index()

    def _index(self) -> dict[str, Path]:
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{self._folder} has no *.safetensors: name a Hugging Face folder (model.path)")
        index: dict[str, Path] = {}
        for path in paths:
            try:
                self._files[str(path)] = file = safe_open(str(path), framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path} is damaged ({error}): copy it again") from None
            index.update(dict.fromkeys(file.keys(), path))
        return index

    def __enter__(self) -> HuggingFaceWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    @property
    def names(self) -> list[str]:
        """All tensors of the folder, in the order of its files."""
        return list(self._file_of)

    def shape_and_type(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' name of the number format, without reading the tensor."""
        part = self._files[str(self._file_of[name])].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str) -> Tensor:
        """One tensor of the folder; UserError where it is missing."""
        path = self._file_of.get(name)
        if path is None:
            raise UserError(f"{self._folder}: tensor {name} is missing from its safetensors")
        tensor: Tensor = self._files[str(path)].get_tensor(name)
        return tensor

    def full(self, name: str) -> Tensor:
        """One full (unsharded) Megatron weight."""
        parts = [self.read(part) for part in huggingface_names(name)]
        matrix = self._listed[name].kind.matrix
        if sum(part.numel() for part in parts) != matrix.rows * matrix.columns:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(
                f"{self._folder}: {name} has shape {shapes}, the model expects {matrix.rows} x {matrix.columns}"
            )
        if len(parts) == 3:
            return fuse_qkv(parts[0], parts[1], parts[2], self._config)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def export_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Full Megatron weights -> Hugging Face tensors, copies."""
    return {name: tensor.contiguous().clone() for name, tensor in named_tensors(weights, config)}


def named_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The same one by one, views of the weights where they can be."""
    for name in catalog(config):
        parts = huggingface_names(name)
        full = weights[name]
        if len(parts) == 3:
            pieces: tuple[Tensor, ...] = split_qkv(full, config)
        else:
            pieces = (full,) if len(parts) == 1 else full.chunk(2, dim=0)
        yield from zip(parts, pieces, strict=True)


def copy_description(source: Path, target: Path) -> None:
    """Everything of a model folder but its weights: config.json, tokenizer, chat template."""
    copy_files(source, target, ("config.json", *TOKENIZER_FILES))


def export_model(
    weights: Mapping[str, Tensor], config: ModelConfig, source: Path, target: Path, *, replace: bool = True
) -> None:
    """Write a folder that transformers loads: weights, `source`'s config.json and its tokenizer.

    The folder appears whole; a model that stands there is replaced, if `replace`.
    """
    tensors = export_tensors(weights, config)
    with whole_folder(target, replace=replace) as folder:
        write_tensors(folder, {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__)
        copy_description(source, folder)
