"""A Hugging Face folder as an engine that serves it, without Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.huggingface import (
    load_tokenizer,
    read_context_length,
    read_engine_weights,
    read_model_config,
)
from npr_engine.engine import Engine, EngineConfig
from npr_engine.kvcache.memory_size import require_kv_memory
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.model.transformer import InferenceModel


@dataclass(frozen=True)
class ServedModel:
    """An engine and what the server has to know about its model.

    `context_length` bounds positions (prompt and critical path).
    """

    name: str
    engine: Engine
    tokenizer: Any
    vocabulary: Vocabulary
    context_length: int


def load_model(folder: Path, *, name: str | None, dtype: torch.dtype, kv_slots: int) -> ServedModel:
    """Reads everything; on the GPU where there is one. UserError for a folder that cannot be served."""
    config = read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = read_engine_weights(folder, config, dtype, device)
    model = InferenceModel(config, weights)
    require_kv_memory(kv_slots, model.kv_bytes_per_slot, model.device, setting="--kv-slots")
    engine = Engine(model, Grammar(vocabulary), EngineConfig(num_kv_slots=kv_slots))
    return ServedModel(
        name=name or folder.resolve().name,
        engine=engine,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        context_length=read_context_length(folder) or kv_slots,
    )
