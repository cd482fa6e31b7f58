"""Counted shapes are those of transformers' own models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_npr.sharding.architecture import KNOWN, Architecture, find_architecture, from_config
from npr_ext.errors import UserError


def library_config(architecture: Architecture) -> Qwen3Config | Qwen3MoeConfig | Qwen2Config | LlamaConfig:
    """An architecture in transformers' words."""
    shape = {
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.tied_embeddings,
    }
    if architecture.num_experts:
        return Qwen3MoeConfig(
            **shape,
            head_dim=architecture.head_dim,
            moe_intermediate_size=architecture.ffn_hidden_size,
            num_experts=architecture.num_experts,
            num_experts_per_tok=architecture.experts_per_token,
        )
    family = Qwen3Config if architecture.qk_norm else Qwen2Config if architecture.qkv_bias else LlamaConfig
    dims = {} if architecture.qkv_bias else {"head_dim": architecture.head_dim}
    return family(**shape, **dims, intermediate_size=architecture.ffn_hidden_size)


QWEN25 = Architecture(24, 896, 14, 2, 64, 4864, 151_936, qk_norm=False, qkv_bias=True, tied_embeddings=True)


@pytest.mark.parametrize("name", [*KNOWN, "Qwen2.5-0.5B"])
def test_parameter_counts_equal_those_of_transformers_on_the_meta_device(name: str) -> None:
    architecture = KNOWN.get(name, QWEN25)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(library_config(architecture))
    total = sum(weight.numel() for weight in model.parameters())
    assert architecture.num_parameters == total
    if architecture.num_experts:
        mlps = sum(weight.numel() for key, weight in model.named_parameters() if ".experts." in key)
        left_out = mlps * (1 - architecture.experts_per_token / architecture.num_experts)
        assert architecture.active_parameters == total - left_out - architecture.embedding_parameters
    elif not architecture.tied_embeddings:
        assert architecture.active_parameters == total - architecture.embedding_parameters
    else:
        assert architecture.active_parameters == total


def test_the_known_shapes_have_the_published_sizes() -> None:
    """Totals as the models' pages on the hub show them; a tied vocabulary matrix counts once."""
    assert {name: shape.num_parameters for name, shape in KNOWN.items()} == {
        "Qwen3-0.6B": 596_049_920,
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
        "Qwen3-14B": 14_768_307_200,
        "Qwen3-32B": 32_762_123_264,
        "Qwen3-30B-A3B": 30_532_122_624,
        "Qwen3-235B-A22B": 235_093_634_560,
        "SmolLM2-135M": 134_515_008,
        "SmolLM2-360M": 361_821_120,
        "SmolLM2-1.7B": 1_711_376_384,
    }


@pytest.mark.parametrize("name", [*KNOWN, "Qwen2.5-0.5B"])
def test_a_config_written_by_transformers_reads_back(name: str, tmp_path: Path) -> None:
    architecture = KNOWN.get(name, QWEN25)
    library_config(architecture).save_pretrained(tmp_path)
    assert find_architecture(str(tmp_path)) == architecture
    assert find_architecture(str(tmp_path / "config.json")) == architecture


def test_names_are_found_with_owner_suffix_and_any_case() -> None:
    assert find_architecture("Qwen/qwen3-4b") == KNOWN["Qwen3-4B"]
    assert find_architecture("models/Qwen3-4B-Instruct-2507") == KNOWN["Qwen3-4B"]
    assert find_architecture("runs/qwen3-4b/stage2/model") == KNOWN["Qwen3-4B"]
    assert find_architecture("Qwen3-30B-A3B") == KNOWN["Qwen3-30B-A3B"]


def test_what_is_not_supported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    mixed = json.loads(Qwen3MoeConfig(mlp_only_layers=[0]).to_json_string())
    for call, message in (
        (lambda: find_architecture("Qwen4-1B"), "neither a config.json nor a known model"),
        (lambda: find_architecture(str(tmp_path)), "not valid JSON"),
        (lambda: from_config({"model_type": "gpt2"}, "here"), "here: model_type 'gpt2' is not supported"),
        (lambda: from_config({"model_type": "qwen3"}, "here"), "here: key 'num_attention_heads' is missing"),
        (lambda: from_config(mixed, "here"), "layers without experts"),
    ):
        with pytest.raises(UserError, match=message):
            call()
