"""Tiny random models of each family that transformers knows and ours must equal."""

from __future__ import annotations

from pathlib import Path

import torch

FAMILIES = ("qwen3 tied", "qwen3 untied", "qwen2", "llama", "llama tied")


def save_family(name: str, folder: Path, *, vocab_size: int = 97) -> Path:
    """Four layers, a vocabulary (of 97) that no tensor-parallel size divides; biases and norms random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, _, tied = name.partition(" ")
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **({} if family == "qwen2" else {"head_dim": 16}),
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied == "tied",
    )
    generator = torch.Generator().manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator) * 0.2
        weight.data = 1 + noise if "norm" in parameter_name else noise
    model.save_pretrained(folder)
    return folder
