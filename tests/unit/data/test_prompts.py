"""Prompts: template, instruction, length limit."""

from pathlib import Path

import pytest

from megatron_npr.data.problem import Problem
from megatron_npr.data.prompts import PromptEncoder, instruction_text
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from npr_engine.language.vocabulary import TAG_TEXTS
from npr_ext.errors import UserError

SHORT, LONG = Problem("short", "1+1?", "2"), Problem("long", "1+1?" * 50, "2")


def encoder(max_prompt_tokens: int) -> PromptEncoder:
    return PromptEncoder(demo_tokenizer(), "Work in order", max_prompt_tokens=max_prompt_tokens)


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    expected = "<|im_start|>user\n1+1?\nWork in order<|im_end|>\n<|im_start|>assistant\n"
    assert encoder(99).text(SHORT) == expected
    assert demo_tokenizer().decode(encoder(99).encode(SHORT)) == expected


def test_prompts_that_are_too_long_are_skipped_and_counted() -> None:
    encoded = encoder(40).encode_all([LONG, SHORT, LONG])
    assert [item.problem for item in encoded.kept] == [SHORT]
    assert encoded.num_skipped == 2


def test_a_limit_below_every_prompt_is_a_mistake() -> None:
    with pytest.raises(
        UserError, match=r"all 2 prompts are longer than data.max_prompt_tokens = 5 \(the shortest has"
    ):
        encoder(5).encode_all([LONG, SHORT])


def test_the_shipped_parallel_instruction_names_every_tag_and_the_sequential_one_none() -> None:
    assert all(tag in instruction_text("parallel") for tag in TAG_TEXTS)
    assert not any(tag in instruction_text("sequential") for tag in TAG_TEXTS)
    assert instruction_text("parallel", demo=True) != instruction_text("sequential", demo=True)


def test_an_instruction_of_ones_own_is_read_and_a_missing_or_empty_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Do it.\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert instruction_text("parallel", path=tmp_path / "own.txt") == "Do it."
    with pytest.raises(UserError, match="empty"):
        instruction_text("parallel", path=tmp_path / "empty.txt")
    with pytest.raises(UserError, match="no instruction file"):
        instruction_text("parallel", path=tmp_path / "none.txt")
