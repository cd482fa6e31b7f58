"""Piecewise encoding: any text comes back, and the demo's tokenizer gives the ids of the whole."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_npr.data.sft_encoding import canonical_ids, encode_response
from megatron_npr.data.synthetic_tasks import demo_tasks
from megatron_npr.data.synthetic_tokenizer import WORDS, demo_tokenizer
from megatron_npr.demo.corpus import parallel_answer, sequential_answer
from npr_engine.language.grammar import Grammar, Response
from npr_engine.language.vocabulary import TAG_TEXTS, Vocabulary

TOKENIZER = demo_tokenizer()
GRAMMAR = Grammar(Vocabulary.from_tokenizer(TOKENIZER))
PIECES = st.sampled_from((*TAG_TEXTS, *WORDS, "\n", " ", "1:", "2: ", "\\boxed{7}", "<step", ">", "é☃"))


@given(st.lists(PIECES | st.text(max_size=5)).map("".join))
def test_any_text_comes_back(text: str) -> None:
    marks = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    if not any(mark in text for mark in marks):
        assert GRAMMAR.vocabulary.text(encode_response(text, GRAMMAR.vocabulary)[:-1].tolist()) == text


@settings(max_examples=50)
@given(st.integers(0, 10_000))
def test_piece_by_piece_gives_the_ids_of_the_whole_text(seed: int) -> None:
    (task,) = demo_tasks("train", 1, seed)
    for text in (parallel_answer(task, random.Random(seed)), sequential_answer(task)):
        ids = encode_response(text, GRAMMAR.vocabulary)
        assert ids.tolist() == [*TOKENIZER.encode(text), TOKENIZER.eos_token_id]
        if isinstance(GRAMMAR.parse(ids, require_block=True), Response):
            assert canonical_ids(ids, GRAMMAR).tolist() == ids.tolist()
