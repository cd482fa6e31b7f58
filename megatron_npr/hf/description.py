"""What a model folder holds beside its weights, and how it goes from folder to folder.

config.json, tokenizer, chat templates, generation defaults, licence ──► copy_description ──► a checkpoint, an export
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from megatron_npr.hf.model_folder import write_json
from megatron_npr.sharding.model_files import read_object

CONFIG = "config.json"
CARD, BASE_CARD = "readme.md", "README.base.md"

_PATTERNS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "licen[cs]e*",
    "notice*",
    "use_policy*",
    "readme*.md",
)
"""Names in lower case: licences are spelled in every way."""

_OF_TOKENS = ("special_tokens_map.json", "added_tokens.json")


def copy_description(source: Path, target: Path, *, new_tokens: bool = False) -> None:
    """Everything of a model folder but its weights. With `new_tokens` the tokenizer is going to be saved anew: files in which
    old versions of transformers kept its tokens stay behind, they would not know the new ones."""
    for path in (*source.iterdir(), *source.glob("additional_chat_templates/*")):
        name = path.relative_to(source).as_posix()
        wanted = any(fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS)
        if path.is_file() and wanted and not (new_tokens and name in _OF_TOKENS):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def rename_card(folder: Path) -> None:
    """A trained model keeps the card of its base, which has its licence, but not as its own."""
    for path in folder.iterdir():
        if path.name.lower() == CARD:
            path.rename(folder / BASE_CARD)


def set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """config.json names the type of the weights: transformers casts them to what it says."""
    config, name = read_object(folder / CONFIG), str(dtype).removeprefix("torch.")
    named = {config.pop(key) for key in ("dtype", "torch_dtype") if key in config}
    if named - {None, name}:
        write_json(folder / CONFIG, {**config, "dtype": name})
