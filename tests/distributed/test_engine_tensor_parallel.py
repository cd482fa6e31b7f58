"""The engine gives the same rollouts on one rank and on two that share the model (gloo)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npr_engine.model.transformer import ModelConfig
from npr_engine.testing import PIECES, block, encode
from tests.support.launch import run_worker

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=len(PIECES) + 4,  # rows that no token has
    tied_embeddings=False,
)


def random_weights() -> dict[str, torch.Tensor]:
    """A random model that tends to close what it opens: tags lead to the tags that follow them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    hidden, ffn = CONFIG.hidden_size, CONFIG.ffn_hidden_size
    heads = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    embedding = normal(CONFIG.vocab_size, hidden) * 4
    output = normal(CONFIG.vocab_size, hidden)
    output[len(PIECES) :] *= 4  # they would be drawn often
    text = encode(block("a|b", "c|d"))
    for before, after in pairwise(text):
        output[after] += 0.35 * embedding[before] / embedding[before].norm()
    weights = {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": output,
        "decoder.final_layernorm.weight": torch.ones(hidden, dtype=torch.float64),
    }
    for layer in range(CONFIG.num_layers):
        attention, mlp = f"decoder.layers.{layer}.self_attention.", f"decoder.layers.{layer}.mlp."
        weights |= {
            attention + "linear_qkv.layer_norm_weight": torch.ones(hidden, dtype=torch.float64),
            attention + "linear_qkv.weight": normal(heads, hidden),
            attention + "q_layernorm.weight": torch.ones(CONFIG.head_dim, dtype=torch.float64),
            attention + "k_layernorm.weight": torch.ones(CONFIG.head_dim, dtype=torch.float64),
            attention + "linear_proj.weight": normal(hidden, CONFIG.num_heads * CONFIG.head_dim) * 0.3,
            mlp + "linear_fc1.layer_norm_weight": torch.ones(hidden, dtype=torch.float64),
            mlp + "linear_fc1.weight": normal(2 * ffn, hidden),
            mlp + "linear_fc2.weight": normal(hidden, ffn) * 0.3,
        }
    return weights


def rollouts(processes: int, weights: Path) -> list[Any]:
    found: list[Any] = json.loads(run_worker("engine", (weights,), processes))
    return found


def test_two_ranks_decode_what_one_decodes(tmp_path: Path) -> None:
    assert CONFIG.vocab_size % 2, "the vocabulary has to be padded"
    prompts = [encode("ab"), encode("<guideline>\n<plan>1: a</plan>\n"), encode("12+3=")] * 4
    weights = tmp_path / "weights.pt"
    torch.save((CONFIG, random_weights(), prompts), weights)
    one, two = rollouts(1, weights), rollouts(2, weights)
    for (tokens, logprobs, reason), (tokens2, logprobs2, reason2) in zip(one, two, strict=True):
        assert (tokens, reason) == (tokens2, reason2) and max(tokens) < len(PIECES)
        np.testing.assert_allclose(logprobs, logprobs2, atol=1e-6)
