"""`npr convert --fp8`: a folder that transformers loads, with the error of eight bits and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_npr.cli import main
from megatron_npr.hf.convert import convert_folder
from megatron_npr.hf.fp8_export import quantize_blocks
from megatron_npr.hf.huggingface import read_model_config
from npr_ext.errors import UserError
from tests.support.families import save_family


@pytest.fixture(scope="module")
def modelopt() -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed (extra modelopt)")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with several blocks a weight."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen3")
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=97,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        weight.data = (
            1 + 0.2 * torch.randn_like(weight) if "norm" in name else 0.05 * torch.randn_like(weight)
        )
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with torch.no_grad():
        found: Tensor = model(torch.arange(90).reshape(2, 45)).logits
    return found


def multiplied_back(folder: Path) -> dict[str, Tensor]:
    """The folder's weights, each element times its block's scale, by indexing alone."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, weight in tensors.items():
        if name + "_scale_inv" in tensors:
            row, column = (torch.arange(size) // 128 for size in weight.shape)
            weight = weight.float() * tensors[name + "_scale_inv"][row[:, None], column[None, :]]
        if not name.endswith("_scale_inv"):
            found[name] = weight
    return found


def test_an_exported_model_loads_in_transformers_with_the_error_of_eight_bits(
    modelopt: None, source: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    pytest.importorskip("accelerate", reason="transformers loads FP8 with accelerate (extra smollm2)")
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "fp8"), "--fp8"]) == 0
    exact, ours = logits(source), logits(tmp_path / "fp8")
    error = float((ours - exact).norm() / exact.norm())
    record_property("relative logit error", error)
    # A rounding of e4m3 is at most 2^-4 and 2.6 % on average; queries times keys in an exponent make more of it.
    assert 1e-3 < error < 0.15, error
    by_hand = tmp_path / "by hand"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict(multiplied_back(tmp_path / "fp8"))
    model.save_pretrained(by_hand)
    torch.testing.assert_close(ours, logits(by_hand), atol=1e-5, rtol=1e-5)


def test_projections_alone_are_eight_bits_and_everything_else_as_it_was(
    modelopt: None, source: Path, tmp_path: Path
) -> None:
    convert_folder(source, tmp_path / "fp8", fp8=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "fp8"))
    eight = {name for name, weight in after.items() if weight.dtype is torch.float8_e4m3fn}
    assert eight == {name for name in before if "_proj." in name}
    assert set(after) == set(before) | {f"{name}_scale_inv" for name in eight}
    for name, weight in multiplied_back(tmp_path / "fp8").items():
        if name not in eight:
            assert torch.equal(weight, before[name]), name
            continue
        bound = before[name].abs() * 2**-4 + before[name].abs().max() / 448 * 2**-10
        assert bool(((weight - before[name]).abs() <= bound).all()), name
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128] and config["modules_to_not_convert"] == ["lm_head"]


def test_blocks_of_zeros_stay_zero(modelopt: None) -> None:
    weight = torch.zeros(256, 256)
    weight[200, 255] = -3.0
    packed, scales = quantize_blocks(weight)
    assert packed[200, 255].float() * scales[1, 1] == -3.0
    assert packed.float().abs().sum() == 448.0 and bool(scales.isfinite().all())


def test_widths_that_are_no_whole_blocks_are_refused_by_name(modelopt: None, tmp_path: Path) -> None:
    source = save_family("qwen3 tied", tmp_path / "source")
    with pytest.raises(UserError, match=r"model\.layers\.0\..*_proj\.weight is .* blocks of 128 x 128"):
        convert_folder(source, tmp_path / "fp8", fp8=True)
    assert not (tmp_path / "fp8").exists()


def test_a_quantised_folder_is_not_taken_for_a_model_to_train(
    modelopt: None, source: Path, tmp_path: Path
) -> None:
    convert_folder(source, tmp_path / "fp8", fp8=True)
    with pytest.raises(UserError, match="holds quantised weights: give the model that they were made from"):
        read_model_config(tmp_path / "fp8")


def test_without_modelopt_the_extra_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization.qtensor", None)
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "fp8"), "--fp8"]) == 2
    assert "--fp8 needs nvidia-modelopt" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()
