"""`npr convert --from` a Hugging Face folder: the same model, with tokens for the tags where they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_npr.cli import main
from megatron_npr.hf.convert import convert_folder
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.hf.model_folder import write_tensors
from npr_engine.language.vocabulary import TAG_TEXTS
from npr_ext.errors import UserError
from tests.support.families import FAMILIES, save_family

NUM_TOKENS = 258
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


def save_tokenizer(folder: Path) -> None:
    """Bytes, the end of a sequence and one tag: 258 ids; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: token for token, text in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<eos>", "<plan>")])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def logits(folder: Path, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(token_ids).logits
    return found


@pytest.mark.parametrize("vocab_size", [280, 260])
@pytest.mark.parametrize("family", ["qwen3 tied", "qwen3 untied"])
def test_tags_get_rows_behind_the_tokenizers_last_id_and_no_row_is_lost(
    family: str, vocab_size: int, tmp_path: Path
) -> None:
    source = save_family(family, tmp_path / "source", vocab_size=vocab_size)
    save_tokenizer(source)
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "with tags"), "--add-tags"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "with tags")
    new = [text for text in TAG_TEXTS if text != "<plan>"]
    assert tokenizer.convert_tokens_to_ids(new) == list(range(NUM_TOKENS, NUM_TOKENS + 7))
    assert tokenizer.encode("a<step>b") == [*tokenizer.encode("a"), 261, *tokenizer.encode("b")]
    assert tokenizer.decode(tokenizer.encode("a<step>é</step>b")) == "a<step>é</step>b"
    assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "<|user|>x"
    rows = max(vocab_size, NUM_TOKENS + 7)
    assert read_model_config(tmp_path / "with tags").vocab_size == rows
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "with tags"))
    assert set(before) == set(after)
    former = AutoTokenizer.from_pretrained(source)
    for name, weight in after.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(weight, before[name]), name
            continue
        assert weight.shape[0] == rows
        kept = [row for row in range(vocab_size) if not NUM_TOKENS <= row < NUM_TOKENS + 7]
        assert torch.equal(weight[kept], before[name][kept])
        for token, text in enumerate(new, start=NUM_TOKENS):
            assert torch.equal(weight[token], before[name][former.encode(text)].mean(0))
    text = torch.arange(40)[None]
    torch.testing.assert_close(
        logits(tmp_path / "with tags", text)[..., :NUM_TOKENS], logits(source, text)[..., :NUM_TOKENS]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_tags_a_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "source")
    print(convert_folder(source, tmp_path / "again", add_tags=False))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert set(before) == set(after) and all(torch.equal(after[name], before[name]) for name in before)
    assert read_model_config(tmp_path / "again") == read_model_config(source)


def test_a_sharded_folder_in_bfloat16_keeps_its_type_and_may_change_it(tmp_path: Path) -> None:
    source = save_family("qwen3 untied", tmp_path / "source")
    whole = {name: weight.bfloat16() for name, weight in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    write_tensors(source, {name: w.nbytes for name, w in whole.items()}, whole.__getitem__, limit=50_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    kept = convert_folder(source, tmp_path / "kept", add_tags=False)
    assert kept.dtype is torch.bfloat16
    assert all(
        torch.equal(w, whole[n]) for n, w in load_file(tmp_path / "kept" / "model.safetensors").items()
    )
    convert_folder(source, tmp_path / "wider", add_tags=False, dtype=torch.float32)
    wider = load_file(tmp_path / "wider" / "model.safetensors")
    assert all(w.dtype is torch.float32 and torch.equal(w, whole[n].float()) for n, w in wider.items())
    assert json.loads((tmp_path / "wider" / "config.json").read_text())["dtype"] == "float32"


def test_what_cannot_be_converted_is_one_clear_line(tmp_path: Path) -> None:
    source = save_family("qwen3 tied", tmp_path / "source")
    with pytest.raises(UserError, match="lies in"):
        convert_folder(source, source, add_tags=False, force=True)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        convert_folder(source, tmp_path / "x", add_tags=True)
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, source / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"stored as I8: convert the model before it was quantised"):
        convert_folder(source, tmp_path / "x", add_tags=False)
    with pytest.raises(UserError, match="does not exist"):
        convert_folder(tmp_path / "none", tmp_path / "x", add_tags=False)
    assert not (tmp_path / "x").exists()
