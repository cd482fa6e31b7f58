"""What ends a response, as a model folder says it.

generation_config.json, or config.json where that says nothing ──► eos_token_id ─┐
tokenizer ──────────────────────────────────────────────────────► its EOS ───────┴─► Vocabulary

transformers stops at the ids of generation_config.json, or else of config.json; vLLM at the tokenizer's EOS, too. So do we:
what ends a response elsewhere ends it here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_npr.hf.huggingface import read_config_json
from megatron_npr.sharding.model_files import read_object
from npr_engine.language.vocabulary import Vocabulary
from npr_ext.errors import UserError


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model folder, empty where there is none; UserError where it is malformed."""
    path = folder / "generation_config.json"
    return read_object(path) if path.is_file() else {}


def read_vocabulary(folder: Path, tokenizer: Any) -> Vocabulary:
    """The tokenizer's vocabulary, in which every EOS that the folder names ends a response. UserError for an
    eos_token_id that the tokenizer does not know."""
    where, value = folder / "generation_config.json", read_generation_config(folder).get("eos_token_id")
    if value is None:
        where, value = folder / "config.json", read_config_json(folder).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = set(tokenizer.get_vocab().values())
    for token in ids:
        if type(token) is not int or token not in known:
            raise UserError(
                f"{where}: eos_token_id {token!r} is no id of the tokenizer: name ids that it has, or leave the key out"
            )
    return Vocabulary.from_tokenizer(tokenizer, ids)
