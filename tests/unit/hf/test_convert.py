"""`npr convert --from-gguf`: the folder that transformers would have made, with tags; whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_npr.cli import main
from megatron_npr.hf.convert import convert_gguf
from megatron_npr.hf.huggingface import load_tokenizer, read_model_config
from npr_engine.language.vocabulary import TAG_TEXTS
from npr_ext.errors import UserError

NewFile = Callable[..., Path]


def state(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return dict(model.state_dict())


def assert_weights_are_transformers_own(folder: Path, file: Path) -> None:
    """Bit for bit, but for the rows of the tags, which are the means of their former pieces' rows."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra smollm2)")
    ours, theirs = state(folder), state(file.parent, gguf_file=file.name)
    tokenizer = load_tokenizer(folder)
    tags = tokenizer.convert_tokens_to_ids(list(TAG_TEXTS))
    backend = tokenizer.backend_tokenizer.model
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        expected = theirs[name].clone()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            for tag, text in zip(tags, TAG_TEXTS, strict=True):
                expected[tag] = theirs[name][spelled(backend, text)].mean(0)
        assert torch.equal(weight, expected), name


def spelled(model: Any, text: str) -> list[int]:
    """Ids of a tag's pieces: brackets and slash are one word of byte-level BPE, the letters another."""
    name = text.strip("</>")
    return [token.id for word in (text[: text.index(name)], name, ">") for token in model.tokenize(word)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_tiny_file_gives_transformers_own_weights(
    quantised: str, tied: bool, new_gguf: NewFile, tmp_path: Path
) -> None:
    file = new_gguf(quantised=quantised, tied=tied)
    done = convert_gguf(str(file), tmp_path / "model")
    assert_weights_are_transformers_own(tmp_path / "model", file)
    config = read_model_config(tmp_path / "model")
    assert (config.tied_embeddings, config.qk_norm, config.qkv_bias) == (tied, False, False)
    assert (config.rope_theta, config.rms_norm_eps) == (5000.0, 1e-5)
    assert done.num_parameters == sum(
        weight.numel()
        for name, weight in state(tmp_path / "model").items()
        if not (tied and name == "lm_head.weight")
    )


@pytest.mark.slow
def test_smollm2_gives_transformers_own_weights(smollm2: Path, smollm2_gguf: Path) -> None:
    assert_weights_are_transformers_own(smollm2, smollm2_gguf)


def test_the_tags_are_single_tokens_on_spare_ids_and_the_rest_keeps_its_id(
    new_gguf: NewFile, tmp_path: Path
) -> None:
    done = convert_gguf(str(new_gguf()), tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert [tokenizer.encode(tag, add_special_tokens=False) for tag in TAG_TEXTS] == [
        [token] for token in done.new_tags
    ]
    # ids 0 to 2 have a role and <spare_1> (id 4) stands in the chat template
    assert done.new_tags == (3, 5, 6, 7, 8, 9, 10, 11)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 4, 12]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<spare_1>",
        "<spare_9>",
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the <step>"}], tokenize=False) == (
        "<|im_start|>the <step><|im_end|><spare_1>"
    )
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tags_that_are_there_stay_where_they_are(new_gguf: NewFile, tmp_path: Path) -> None:
    file = new_gguf()
    convert_gguf(str(file), tmp_path / "first")
    known = load_tokenizer(tmp_path / "first").convert_ids_to_tokens(range(13))
    tokens = [*known, *_tokens()[13:]]
    done = convert_gguf(str(new_gguf({"tokenizer.ggml.tokens": tokens})), tmp_path / "second")
    assert done.new_tags == ()
    tokenizer = load_tokenizer(tmp_path / "second")
    assert [tokenizer.encode(tag) for tag in TAG_TEXTS] == [[known.index(tag)] for tag in TAG_TEXTS]


def _tokens() -> list[str]:
    from tests.unit.hf.conftest import tiny_metadata

    return list(tiny_metadata()["tokenizer.ggml.tokens"])


def test_bfloat16_rounds_the_same_weights(new_gguf: NewFile, tmp_path: Path) -> None:
    file = new_gguf()
    convert_gguf(str(file), tmp_path / "full")
    convert_gguf(str(file), tmp_path / "half", dtype=torch.bfloat16)
    full = state(tmp_path / "full")
    for name, weight in state(tmp_path / "half").items():
        assert torch.equal(weight, full[name].bfloat16().float())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2' is not supported, only 'smollm'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token is set"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is set"),
        ({"llama.expert_count": 8}, "llama.expert_count is set"),
        ({"llama.block_count": None}, "its metadata lacks llama.block_count"),
        ({"llama.block_count": 3}, r"model\.layers\.2\.\S+ is missing"),
        ({"llama.block_count": 1}, r"model\.layers\.1\.\S+ belongs to no layer"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\], expected int"),
        ({"llama.attention.head_count_kv": 4}, r"k_proj.weight has shape \(32, 64\)"),
        ({"llama.feed_forward_length": 100}, r"asks for \(100, 64\)"),
        ({"llama.rope.dimension_count": 8}, "only the head size 16"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "embed_tokens"),
        ({"tokenizer.ggml.token_type": [3, 1]}, "2 token types"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "no pair"),
        ({"tokenizer.ggml.merges": ["x y"]}, "merges 'x' and 'y', which are no tokens"),
        ({"tokenizer.ggml.eos_token_id": 999999}, "eos token 999999"),
        ({"tokenizer.ggml.eos_token_id": None}, "names no end-of-sequence token"),
        ({"tokenizer.chat_template": "".join(f"<spare_{n}>" for n in range(5))}, "5 special tokens to spare"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_in_one_line(
    changed: dict[str, Any],
    message: str,
    new_gguf: NewFile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = new_gguf(changed)
    with pytest.raises(UserError, match=message):
        convert_gguf(str(file), tmp_path / "model")
    capsys.readouterr()
    assert main(["convert", "--from-gguf", str(file), "--to", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_another_architecture_and_unknown_tensors_are_named(new_gguf: NewFile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="architecture 'mamba' is not supported, only 'llama'"):
        convert_gguf(str(new_gguf(architecture="mamba")), tmp_path / "model")
    with pytest.raises(UserError, match=r"'blk\.0\.attn_q\.bias' is no part of a Llama model"):
        convert_gguf(
            str(new_gguf(tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)})), tmp_path / "model"
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 14_000) | st.none(),
)
def test_a_damaged_file_is_converted_or_refused_and_never_anything_else(
    flips: list[tuple[int, int]], cut: int | None, new_gguf: NewFile, tmp_path: Path
) -> None:
    """Metadata lies in the first 12 kB."""
    file = tmp_path / "tiny.gguf"
    content = bytearray((file if file.exists() else new_gguf()).read_bytes())
    for place, value in flips:
        content[place] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[:cut])
    with contextlib.suppress(UserError):
        convert_gguf(str(damaged), tmp_path / "model", force=True)


def test_an_existing_folder_is_replaced_only_when_told_to_and_only_if_it_is_a_model(
    new_gguf: NewFile, tmp_path: Path
) -> None:
    file, target = new_gguf(), tmp_path / "model"
    convert_gguf(str(file), target)
    (target / "mark").touch()
    with pytest.raises(UserError, match="exists already"):
        convert_gguf(str(file), target)
    assert (target / "mark").exists()
    convert_gguf(str(file), target, force=True)
    assert not (target / "mark").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(UserError, match="something else than a model"):
        convert_gguf(str(file), other, force=True)
    with pytest.raises(UserError, match="is a file"):
        convert_gguf(str(file), file, force=True)
    inside = target / "source.gguf"
    file.rename(inside)
    with pytest.raises(UserError, match="would be replaced"):
        convert_gguf(str(inside), target, force=True)
    assert inside.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_missing_file_and_an_unwritable_place_are_one_line(
    new_gguf: NewFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--from-gguf", "absent.gguf", "--to", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err == ("npr: error: absent.gguf: no such GGUF file (a name can be smollm2)\n")
    (tmp_path / "file").touch()
    file = new_gguf()
    assert main(["convert", "--from-gguf", str(file), "--to", str(tmp_path / "file" / "m")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_says_what_it_wrote(
    new_gguf: NewFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "--from-gguf", str(new_gguf()), "--to", str(tmp_path / "m"), "--dtype", "bfloat16"]
    assert main(words) == 0
    assert "parameters in bfloat16, tags added: ids 3, 5, 6" in capsys.readouterr().out
