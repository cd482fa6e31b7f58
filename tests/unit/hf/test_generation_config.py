"""Which ids end a response, by what a model folder says of it: table of sources, beside transformers' own reading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from megatron_npr.demo.base import FOLDER
from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.huggingface import load_tokenizer
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import TokenClass
from npr_ext.errors import UserError

TOKENIZER = load_tokenizer(FOLDER)
END, PAD, START = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", TOKENIZER.pad_token, "<|im_start|>"])
MISSING = object()


def folder(place: Path, generation: Any, config: Any) -> Path:
    """The demo's model folder without weights; `generation` and `config` are the eos_token_id of each file. The former is
    MISSING: no file; the latter: no key."""
    shutil.copyfile(FOLDER / "tokenizer.json", place / "tokenizer.json")
    shutil.copyfile(FOLDER / "tokenizer_config.json", place / "tokenizer_config.json")
    known = json.loads((FOLDER / "config.json").read_text())
    known.pop("eos_token_id")
    (place / "config.json").write_text(
        json.dumps(known if config is MISSING else known | {"eos_token_id": config})
    )
    if generation is not MISSING:
        (place / "generation_config.json").write_text(json.dumps(generation))
    return place


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        (MISSING, MISSING, [END]),
        (MISSING, END, [END]),
        (MISSING, PAD, [END, PAD]),
        (MISSING, [START, PAD], [END, START, PAD]),
        ({"eos_token_id": PAD}, END, [END, PAD]),
        ({"eos_token_id": [PAD]}, START, [END, PAD]),
        ({"eos_token_id": [PAD, END]}, END, [END, PAD]),
        ({"eos_token_id": [PAD, START, PAD]}, MISSING, [END, PAD, START]),
        ({"eos_token_id": []}, PAD, [END]),
        ({"eos_token_id": None}, PAD, [END, PAD]),
        ({"temperature": 0.6}, PAD, [END, PAD]),
        ({}, MISSING, [END]),
    ],
)
def test_every_id_that_the_folder_names_ends_a_response(
    generation: Any, config: Any, expected: list[int], tmp_path: Path
) -> None:
    place = folder(tmp_path, generation, config)
    vocabulary = read_vocabulary(place, TOKENIZER)
    assert list(vocabulary.eos_ids) == expected and vocabulary.eos_id == END
    assert [vocabulary.classes[token] for token in expected] == [TokenClass.EOS] * len(expected)
    for token in expected:
        reading = Grammar(vocabulary).read([*TOKENIZER.encode("\\boxed{1}"), token])
        assert reading.defect is None and reading.response.eos
    assert transformers_ids(place) <= set(expected)


def transformers_ids(place: Path) -> set[int]:
    """What transformers' generate() stops at."""
    try:
        found = GenerationConfig.from_pretrained(str(place))
    except OSError:
        found = GenerationConfig.from_model_config(AutoConfig.from_pretrained(str(place)))
    ids = found.eos_token_id
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    "wrong", [340, 999_999, 1 << 40, -1, [END, 340], "2", 1.0, True, {"a": 1}, [[END]], [None]]
)
def test_an_eos_that_the_tokenizer_does_not_know_is_one_line(file: str, wrong: Any, tmp_path: Path) -> None:
    in_generation = file == "generation_config.json"
    place = folder(
        tmp_path, {"eos_token_id": wrong} if in_generation else MISSING, END if in_generation else wrong
    )
    value = next(each for each in (wrong if isinstance(wrong, list) else [wrong]) if each != END)
    with pytest.raises(UserError) as caught:
        read_vocabulary(place, TOKENIZER)
    message = str(caught.value)
    assert f"{file}: eos_token_id {value!r} is no id of the tokenizer" in message and "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"eos"', "null", "\ufeff{}", '{"eos_token_id": 1,}'])
def test_a_malformed_generation_config_is_one_line(text: str, tmp_path: Path) -> None:
    place = folder(tmp_path, MISSING, END)
    (place / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"generation_config\.json:.* (not valid JSON|expected a JSON object)"
    ) as caught:
        read_vocabulary(place, TOKENIZER)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    place = folder(tmp_path, MISSING, END)
    (place / "generation_config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UserError, match=r"generation_config\.json: not UTF-8 at byte 0"):
        read_vocabulary(place, TOKENIZER)


def test_a_tag_cannot_end_a_response(tmp_path: Path) -> None:
    tag = TOKENIZER.convert_tokens_to_ids("</step>")
    with pytest.raises(UserError, match="different token ids"):
        read_vocabulary(folder(tmp_path, {"eos_token_id": [tag]}, END), TOKENIZER)
