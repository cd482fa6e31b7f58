"""Whatever config.json says of positions and arithmetic is computed as transformers does, or refused by name."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_npr.hf.huggingface import read_engine_weights, read_model_config
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.sharding.architecture import from_config
from npr_engine.model.architecture import ModelConfig
from npr_engine.model.transformer import InferenceModel
from npr_ext import branch_layout
from npr_ext.errors import UserError
from tests.support.families import save_family
from tests.support.logits.engine import engine_logits
from tests.support.training import TAGS

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
Row = tuple[str, dict[str, Any]]

HONOURED: dict[str, Row] = {
    "theta beside": ("llama", {"rope_theta": 500.0}),
    "theta inside": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "theta inside and beside": (
        "llama",
        {"rope_theta": 7.0, "rope_parameters": {**DEFAULT, "rope_theta": 500.0}},
    ),
    "theta of neither": ("qwen3", {}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}),
    "linear in the new spelling": (
        "qwen2",
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}},
    ),
    "linear beside default": (
        "qwen3",
        {"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
    "yarn": ("qwen3", {"rope_scaling": YARN, "rope_theta": 1e6}),
    "yarn beside default": ("qwen3", {"rope_parameters": DEFAULT, "rope_scaling": YARN}),
    "yarn beside default with its theta": (
        "qwen3",
        {"rope_parameters": {**DEFAULT, "rope_theta": 1e6}, "rope_scaling": {**YARN, "rope_theta": 1e6}},
    ),
    "yarn beside default with theta beside both": (
        "qwen3",
        {"rope_parameters": {**DEFAULT, "rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 1e6},
    ),
    "yarn of experts": ("qwen3_moe", {"rope_scaling": YARN, "rope_theta": 1e6}),
    "yarn with type": ("qwen2", {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 1e6}),
    "yarn without its context": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 20, "rope_theta": 1e6},
    ),
    "yarn with its context beside": (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 24, "rope_theta": 1e5},
    ),
    "yarn with a null factor": (
        "llama",
        {"rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 64},
    ),
    "yarn with an attention factor": ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.7}}),
    "yarn with bounds": ("llama", {"rope_scaling": {**YARN, "beta_fast": 2.0, "beta_slow": 0.5}}),
    "yarn with bounds that meet": ("llama", {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}}),
    "yarn not truncated": ("llama", {"rope_scaling": {**YARN, "truncate": False}}),
    "yarn of two scales": ("llama", {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    "yarn of one scale": ("llama", {"rope_scaling": {**YARN, "mscale": 2.0}}),
    "yarn that shrinks": ("llama", {"rope_scaling": {**YARN, "factor": 0.5}}),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama3 inside": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama3 without its context": (
        "llama",
        {
            "rope_parameters": {
                **{k: v for k, v in LLAMA3.items() if "context" not in k},
                "rope_theta": 100.0,
            },
            "max_position_embeddings": 64,
        },
    ),
    "swish": ("llama", {"hidden_act": "swish"}),
    "a window that is not used": (
        "qwen3",
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1},
    ),
    "layers that see all": ("qwen3", {"layer_types": ["full_attention"] * 4}),
    "neutral values": (
        "llama",
        {
            "rope_interleaved": False,
            "pretraining_tp": 1,
            "mlp_bias": False,
            "logit_scale": 1.0,
            "partial_rotary_factor": 1.0,
        },
    ),
    "a head size that is not given": ("llama", {"head_dim": None}),
    "empty tables": ("llama", {"rope_scaling": {}, "rope_parameters": None}),
}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn that takes theta away": (
        "qwen3",
        {"rope_parameters": {**DEFAULT, "rope_theta": 1e6}, "rope_scaling": YARN},
        "rope_scaling replaces rope_parameters, and rope_theta would be 10000 instead of 1e",
    ),
    "linear that takes theta away": (
        "llama",
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling replaces rope_parameters",
    ),
    "dynamic": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported",
    ),
    "longrope": ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    "proportional": ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional'"),
    "mrope": ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type 'mrope'"),
    "sections of a default": (
        "qwen2",
        {"rope_scaling": {"mrope_section": [2, 3, 3]}},
        "'mrope_section' is no setting",
    ),
    "a factor without a type": (
        "llama",
        {"rope_scaling": {"factor": 2.0}},
        "'factor' is no setting of rope_type 'default'",
    ),
    "linear without a factor": (
        "llama",
        {"rope_scaling": {"type": "linear"}},
        "rope_type 'linear' needs 'factor'",
    ),
    "a factor that is text": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        "factor is '2', expected",
    ),
    "a factor of nothing": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 0}},
        "factor is 0, expected",
    ),
    "an endless factor": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
        "factor is inf",
    ),
    "bounds of llama3 in disorder": (
        "llama",
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
        "high_freq_factor 1.0 has to be above low_freq_factor 1.0",
    ),
    "llama3 without bounds": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}},
        "rope_type 'llama3' needs 'low_freq_factor'",
    ),
    "yarn of no context": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": None},
        "original_max_position_embeddings is None",
    ),
    "a part of the head": (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 is not supported",
    ),
    "a part of the head, inside": (
        "llama",
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        "partial_",
    ),
    "RoPE by layer": (
        "qwen3",
        {"rope_parameters": {"full_attention": DEFAULT}, "layer_types": ["full_attention"] * 4},
        r"RoPE of its own for some layers \('full_attention'\)",
    ),
    "theta that is null": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        "rope_theta is None",
    ),
    "theta of one": (
        "llama",
        {"rope_theta": 1, "rope_scaling": YARN},
        "rope_theta is 1.0, expected a number above 1",
    ),
    "theta below nothing": ("llama", {"rope_theta": -1.0}, "rope_theta is -1.0, expected a positive number"),
    "a list": ("llama", {"rope_scaling": [1]}, r"rope_scaling is \[1\], expected a table"),
    "a window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "use_sliding_window",
    ),
    "a window of some layers": (
        "qwen3",
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        "layer_types 'sliding_attention' is not supported",
    ),
    "layers without RoPE": ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias True is not supported, only False"),
    "biases of the MLP": ("llama", {"mlp_bias": True}, "mlp_bias True"),
    "another activation": ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh'"),
    "Granite's scale": ("llama", {"attention_multiplier": 0.01}, "attention_multiplier 0.01"),
    "Granite's logits": ("llama", {"logits_scaling": 8.0}, "logits_scaling 8.0 is not supported, only 1"),
    "Gemma's limits": ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "norms that Llama lacks": ("llama", {"qk_norm": True}, "qk_norm True is not supported, only False"),
    "no norms in Qwen3": ("qwen3", {"use_qk_norm": False}, "use_qk_norm False is not supported, only True"),
    "neighbours rotated": ("llama", {"rope_interleaved": True}, "rope_interleaved True"),
    "experts of some layers": ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
    "experts of every other layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "layers without experts"),
    "shared experts": (
        "qwen3_moe",
        {"shared_expert_intermediate_size": 48},
        "shared_expert_intermediate_size 48",
    ),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    names = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3 untied", "qwen3_moe": "qwen3_moe"}
    return {family: save_family(name, place / family) for family, name in names.items()}


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 97, 48))


def rewritten(folder: Path, changed: dict[str, Any], target: Path) -> Path:
    """The model with other keys in its config.json; those of RoPE are the changed ones alone, None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")} | changed
    target.mkdir()
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    kept = {key: value for key, value in config.items() if value is not None or key.startswith("rope_")}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def their_logits(folder: Path, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model(token_ids[None]).logits[0]
    return logits.double()


def our_logits(folder: Path, token_ids: Tensor, world: World) -> dict[str, Tensor]:
    """Logits of engine and policy by name."""
    config = read_model_config(folder)
    weights = read_engine_weights(folder, config, torch.float32, world.device)
    policy = build_policy(config, world).eval()
    load_policy_weights(policy, folder)
    layout = branch_layout(token_ids, tags=TAGS, prompt_lengths=4, branching=False).as_tensor()
    # Megatron's dispatcher of experts names CUDA; dense models run without the CPU runtime, and by torch's own products.
    runtime = megatron_context() if config.num_experts else contextlib.nullcontext()
    with torch.no_grad(), runtime:
        trained = policy.logits(token_ids[None], layout)[0]
    return {
        "engine": engine_logits(InferenceModel(config, weights), token_ids).double(),
        "policy": trained.double(),
    }


@pytest.mark.parametrize("row", HONOURED)
def test_the_logits_are_transformers_own_as_exactly_as_its_own_float32(
    row: str, families: dict[str, Path], token_ids: Tensor, world: World, tmp_path: Path
) -> None:
    family, changed = HONOURED[row]
    folder = rewritten(families[family], changed, tmp_path / "model")
    exact = their_logits(folder, token_ids, torch.float64)
    theirs = (their_logits(folder, token_ids, torch.float32) - exact).square().mean().sqrt()
    for side, logits in our_logits(folder, token_ids, world).items():
        ours = (logits - exact).square().mean().sqrt()
        assert ours <= 2 * theirs, f"{side}: {ours / theirs} times transformers' own error"
    if (
        any(key.startswith("rope_") and value for key, value in changed.items())
        and "linear beside" not in row
    ):
        plain = rewritten(families[family], {}, tmp_path / "plain")
        moved = (their_logits(plain, token_ids, torch.float64) - exact).square().mean().sqrt()
        assert moved > 100 * theirs, "the row tells nothing: RoPE as it is by default gives these logits too"


@pytest.mark.parametrize("row", REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    row: str, families: dict[str, Path], tmp_path: Path
) -> None:
    family, changed, message = REFUSED[row]
    folder = rewritten(families[family], changed, tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(folder)
    assert "\n" not in str(caught.value) and str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("row", ["yarn with an attention factor", "llama3", "linear", "theta beside"])
def test_a_configuration_comes_back_from_the_plain_data_of_a_manifest(
    row: str, families: dict[str, Path]
) -> None:
    family, changed = HONOURED[row]
    config = json.loads((families[family] / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")} | changed
    model = from_config(config, "config.json")
    assert ModelConfig.of(json.loads(json.dumps(asdict(model)))) == model
