"""Reading a model folder's configuration: what would be computed wrongly is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_npr.hf.huggingface import read_model_config
from npr_ext.errors import UserError

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
}


def folder_of(tmp_path: Path, **changed: Any) -> Path:
    config = {key: value for key, value in (LLAMA | changed).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "family, qk_norm, qkv_bias", [("qwen3", True, False), ("qwen2", False, True), ("llama", False, False)]
)
def test_the_family_decides_on_norms_of_heads_and_biases(
    family: str, qk_norm: bool, qkv_bias: bool, tmp_path: Path
) -> None:
    config = read_model_config(folder_of(tmp_path, model_type=family))
    assert (config.qk_norm, config.qkv_bias) == (qk_norm, qkv_bias)
    head_dim = 128 if family == "qwen3" else 16  # as in transformers, where the file does not say
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, head_dim, 10_000.0)


@pytest.mark.parametrize("rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}])
def test_both_spellings_of_the_base_of_rope_are_read(rope: dict[str, Any], tmp_path: Path) -> None:
    assert read_model_config(folder_of(tmp_path, **rope)).rope_theta == 5e5


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: qwen3, qwen3_moe, qwen2, llama"),
        ({"vocab_size": None}, "key 'vocab_size' is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True, expected a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    ],
)
def test_what_our_models_would_compute_wrongly_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_model_config(folder_of(tmp_path, **changed))
