"""What leaves convert, a checkpoint or a stage tokenizes, chats and generates as what came in, and carries its licence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_npr.hf.convert import convert_folder
from megatron_npr.hf.description import copy_description
from megatron_npr.hf.huggingface import export_model, load_tokenizer, read_engine_weights, read_model_config
from megatron_npr.hf.model_folder import _exchange
from npr_engine.language.vocabulary import TAG_TEXTS
from npr_ext.errors import UserError
from tests.unit.hf.test_convert_folder import save_tokenizer

TEXTS = [
    "",
    "hello",
    " two  spaces\n\ttab",
    "naïve 東京 🙂",
    "<eos>",
    "a<plan>b",
    "<eos><plan> <tool>",
    "12+34=46\r\n",
]
CHAT = [{"role": "user", "content": "x<plan>y"}, {"role": "assistant", "content": "é"}]
GENERATION = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "do_sample": True,
    "eos_token_id": [256, 3],
    "pad_token_id": 3,
}
ALONG = {
    "generation_config.json": json.dumps(GENERATION),
    "chat_template.jinja": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}",
    "additional_chat_templates/tools.jinja": "{% for m in messages %}<tool>{{ m.content }}{% endfor %}",
    "special_tokens_map.json": json.dumps({"eos_token": "<eos>", "pad_token": "<plan>"}),
    "added_tokens.json": json.dumps({"<eos>": 256, "<plan>": 257}),
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "LICENSE": "Apache-2.0",
    "Licence.txt": "in British",
    "NOTICE": "made by",
    "USE_POLICY.md": "be kind",
}
LEFT = {
    "optimizer.pt": "x",
    "pytorch_model.bin": "x",
    ".gitattributes": "x",
    "trainer_state.json": "{}",
    "run.py": "x",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all that people's folders hold, wide enough for blocks of FP8."""
    folder = tmp_path_factory.mktemp("source")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 265}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    config = AutoConfig.for_model("qwen3", **sizes, **heads, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in {**ALONG, **LEFT, "README.md": "the base"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def export(source: Path, target: Path) -> None:
    """As a stage writes its model, weights in the type of training."""
    config = read_model_config(source)
    export_model(
        read_engine_weights(source, config, torch.bfloat16, torch.device("cpu")), config, source, target
    )


def export_of_a_checkpoint(source: Path, target: Path) -> None:
    """By way of the description that a checkpoint carries."""
    description = target.with_name("description")
    description.mkdir()
    copy_description(source, description)
    assert not list(description.glob("*.safetensors"))
    config = read_model_config(source)
    weights = read_engine_weights(source, config, torch.float32, torch.device("cpu"))
    export_model(weights, config, description, target)


def convert_to_fp8(source: Path, target: Path) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed (extra modelopt)")
    convert_folder(source, target, fp8=True)


def through_links(source: Path, target: Path) -> None:
    """As the hub's cache keeps a model: every file a link."""
    links = target.with_name("links")
    for path in (path for path in source.rglob("*") if path.is_file()):
        place = links / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    convert_folder(links, target)


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "convert": convert_folder,
    "convert to bfloat16": lambda source, target: convert_folder(source, target, dtype=torch.bfloat16),
    "convert to FP8": convert_to_fp8,
    "convert with tags": lambda source, target: convert_folder(source, target, add_tags=True),
    "from the hub's cache": through_links,
    "a stage's model": export,
    "a checkpoint's model": export_of_a_checkpoint,
    "a stage's model of a stage's model": lambda source, target: (
        export(source, target.with_name("first")),
        export(target.with_name("first"), target),
    ),
}


def speech(folder: Path) -> dict[str, Any]:
    """What a tokenizer makes of texts and chats."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(each) for each in ids],
        "plain texts": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False),
        "tools": tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template="tools"),
        "roles": (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id),
    }


@pytest.mark.parametrize("way", WAYS)
def test_tokenizer_chat_and_generation_defaults_come_through_with_the_licence(
    way: str, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    WAYS[way](source, target)
    before, after = speech(source), speech(target)
    if way == "convert with tags":
        tokenizer = AutoTokenizer.from_pretrained(target)
        assert all(len(tokenizer.encode(tag)) == 1 for tag in TAG_TEXTS)
    assert before == after
    assert before["tools"] == "<tool>x<plan>y<tool>é" and before["chat"].endswith("é<eos>")
    theirs, ours = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (source, target))
    assert theirs == ours and ours["eos_token_id"] == [256, 3]
    replaced = {"special_tokens_map.json", "added_tokens.json"} if way == "convert with tags" else set()
    for name in set(ALONG) - replaced:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    assert not any((target / name).exists() for name in LEFT)
    card = "README.base.md" if "model" in way else "README.md"
    assert [(path.name, path.read_text()) for path in target.glob("README*")] == [(card, "the base")]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_an_export_says_the_type_of_its_weights(key: str | None, source: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    convert_folder(source, said)
    config = json.loads((said / "config.json").read_text())
    config.pop("dtype")
    (said / "config.json").write_text(json.dumps(config | ({key: "float32"} if key else {})))
    for dtype, target in ((torch.bfloat16, tmp_path / "half"), (torch.float16, tmp_path / "converted")):
        if target.name == "half":
            export(said, target)
        else:
            convert_folder(said, target, dtype=dtype)
        assert AutoModelForCausalLM.from_pretrained(target).dtype is dtype
        written = json.loads((target / "config.json").read_text())
        assert {written.get("dtype", None), written.get("torch_dtype", None)} <= {str(dtype)[6:], None}


DAMAGE: dict[str, tuple[str, str]] = {
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer"),
    "cut off": ('{"version": "1.0", "model": {', "its tokenizer cannot be read"),
    "empty": ("", "its tokenizer cannot be read"),
    "something else": ("[1, 2]", "its tokenizer cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_one_line(damage: str, source: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "model")
    text, message = DAMAGE[damage]
    (tmp_path / "model" / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_take_its_place_leaves_the_old_one_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(FileNotFoundError):
        _exchange(tmp_path / "never written", target, tmp_path / "aside")
    assert (target / "config.json").read_text() == "old" and not (tmp_path / "aside").exists()


def test_weights_that_training_has_ruined_are_not_exported_over_a_good_model(
    source: Path, tmp_path: Path
) -> None:
    config = read_model_config(source)
    weights = read_engine_weights(source, config, torch.float32, torch.device("cpu"))
    export_model(weights, config, source, tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    ruined = {name: weight.clone() for name, weight in weights.items()}
    ruined["decoder.final_layernorm.weight"][5] = torch.nan
    with pytest.raises(UserError, match=r"model\.norm\.weight in float32 holds NaN: nothing was written"):
        export_model(ruined, config, source, tmp_path / "model")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_no_number_is_named_at_the_export_to_fp8(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed (extra modelopt)")
    convert_folder(source, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight holds infinite values"):
        convert_folder(tmp_path / "model", tmp_path / "fp8", fp8=True)
    assert not (tmp_path / "fp8").exists()
