"""Tiny random models of each family that transformers knows and ours must equal."""

from __future__ import annotations

from pathlib import Path

import torch

DENSE_FAMILIES = ("qwen3 tied", "qwen3 untied", "qwen2", "llama", "llama tied")
FAMILIES = (*DENSE_FAMILIES, "qwen3_moe", "qwen3_moe unnormalised")
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3}


def save_family(name: str, folder: Path, *, vocab_size: int = 97, num_key_value_heads: int = 2) -> Path:
    """Four layers, a vocabulary (of 97) that no tensor-parallel size divides; biases and norms random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, _, kind = name.partition(" ")
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        **({} if family == "qwen2" else {"head_dim": 16}),
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=kind == "tied",
        **({**EXPERTS, "norm_topk_prob": kind != "unnormalised"} if family == "qwen3_moe" else {}),
    )
    generator = torch.Generator().manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator) * 0.2
        weight.data = 1 + noise if "norm" in parameter_name else noise
    model.save_pretrained(folder)
    return folder
