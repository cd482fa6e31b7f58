"""The demo's tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer

from megatron_npr.data.synthetic_tokenizer import END, PAD, WORDS, demo_tokenizer, save_demo_tokenizer
from npr_engine.language.vocabulary import TAG_TEXTS


def test_words_tags_and_marks_are_single_tokens_and_the_vocabulary_is_small() -> None:
    tokenizer = demo_tokenizer()
    for text in (*WORDS, *TAG_TEXTS, PAD, END, "<|im_start|>", *"0123456789"):
        assert len(tokenizer.encode(text)) == 1, text
    assert len(tokenizer) <= 400
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, tokenizer.pad_token_id]) == [END, PAD]


def test_digits_stand_alone() -> None:
    tokenizer = demo_tokenizer()
    assert [tokenizer.decode([token]) for token in tokenizer.encode(" pen=59*6")] == [" pen", *"=59*6"]


def test_it_survives_saving_and_transformers_loads_it(tmp_path: Path) -> None:
    save_demo_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    made = demo_tokenizer()
    text = "Sort by cost: pen=59*6\n<plan>1: ☃</plan>"
    message = [{"role": "user", "content": text}]
    assert loaded.encode(text) == made.encode(text)
    assert loaded.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    ) == made.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert (loaded.eos_token, loaded.pad_token) == (END, PAD)
