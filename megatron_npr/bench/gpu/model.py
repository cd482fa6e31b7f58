"""The model of the GPU bench: Qwen3-4B's shape, random weights made on the device, and a script that CUDA graphs can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_npr.sharding.architecture import KNOWN
from megatron_npr.sharding.catalog import catalog
from npr_engine.model.linear import Weight
from npr_engine.model.transformer import InferenceModel, KVCache, ModelConfig, Step

NAME = "Qwen3-4B"
FULL = ModelConfig(**vars(KNOWN[NAME]))
TINY = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden_size=96,
    vocab_size=1100,
)
"""Holds the ids of npr_ext.testing.random_layout."""

SCRIPTED_LOGIT = 1e4


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Normal numbers, 0.02 wide; norms are one. Under Megatron's names."""
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, weight in catalog(config).items():
        rows, columns = weight.kind.matrix.rows, weight.kind.matrix.columns
        if columns == 1:
            weights[name] = torch.ones(rows, device=device, dtype=dtype)
        else:
            drawn = torch.empty(rows, columns, device=device, dtype=dtype)
            weights[name] = drawn.normal_(0.0, 0.02, generator=generator)
    return weights


class ScriptedModel(InferenceModel):
    """Says what a script has for the position, whatever the weights say; its step runs on the device alone."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Weight], num_positions: int, *, fp8: bool = False
    ) -> None:
        super().__init__(config, weights, fp8=fp8)
        self._script = torch.zeros(num_positions, dtype=torch.int64, device=self.device)

    def follow(self, script: Tensor) -> None:
        """From the next step on. int64 [P], the token after each position; -1 where nothing is sampled. Copied to where
        captured graphs read it."""
        self._script[: len(script)].copy_(script.clamp(min=0))

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """As InferenceModel's; the scripted token has the largest logit by far."""
        logits_SV = super().forward(step, cache)
        said_S = self._script[step.positions.index_select(0, step.sample_index).long()]
        return logits_SV.scatter_(1, said_S[:, None], SCRIPTED_LOGIT)


def bytes_read(config: ModelConfig, dtype: torch.dtype, *, fp8: bool) -> int:
    """Weights that a decode step reads: all of them, the vocabulary once; in FP8 a byte for each number of a projection."""
    attention = (config.qkv_rows + config.num_heads * config.head_dim) * config.hidden_size
    projections = config.num_layers * (attention + config.expert_parameters)
    return config.active_parameters * dtype.itemsize - fp8 * projections * (dtype.itemsize - 1)
