"""What the base model reads: right arithmetic, the valid format more often than any blemish."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from megatron_npr.data.sft_encoding import encode_response
from megatron_npr.data.synthetic_tasks import demo_tasks
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from megatron_npr.demo.base import base_sequences
from megatron_npr.demo.corpus import (
    BLEMISHES,
    VALID_SHARE,
    Blemish,
    parallel_answer,
    parallel_draft,
    sequential_answer,
)
from megatron_npr.rl.rewards import format_reward
from npr_engine.language.grammar import Defect, Grammar, Response, last_boxed
from npr_engine.language.vocabulary import Vocabulary

TASKS = demo_tasks("train", 30, seed=0)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(Vocabulary.from_tokenizer(demo_tokenizer()))


def test_the_clean_answers_are_valid_and_right(grammar: Grammar) -> None:
    for task in TASKS:
        ids = encode_response(parallel_draft(task).text, grammar.vocabulary)
        tree = grammar.parse(ids, require_block=True)
        assert isinstance(tree, Response), tree
        boxed = last_boxed(grammar.text(ids, tree.conclusion))
        assert boxed == task.answer == last_boxed(sequential_answer(task))
        assert len(tree.blocks[0].steps) == len(task.parts)
        assert format_reward(grammar, ids) == 0.0


@pytest.mark.parametrize("blemish", list(BLEMISHES), ids=lambda blemish: blemish.__name__)
def test_every_blemish_makes_an_answer_invalid(grammar: Grammar, blemish: Blemish) -> None:
    for task in TASKS:
        text = blemish(parallel_draft(task), random.Random(0)).text
        ids = encode_response(text, grammar.vocabulary)
        assert isinstance(grammar.parse(ids, require_block=True), Defect), text
        assert format_reward(grammar, ids) < 0


def test_no_blemish_is_half_as_frequent_as_the_valid_form() -> None:
    assert max(BLEMISHES.values()) / sum(BLEMISHES.values()) * (1 - VALID_SHARE) < VALID_SHARE / 2


def test_all_arithmetic_in_the_corpus_is_right() -> None:
    rng = random.Random(0)
    worked = 0
    for task in demo_tasks("train", 200, seed=1):
        for text in (sequential_answer(task), parallel_answer(task, rng)):
            for a, b, tens, ones, total in re.findall(r"=(\d+)\*(\d)=(\d+)\+(\d+)=(\d+)\n", text):
                assert int(a) * int(b) == int(tens) + int(ones) == int(total)
                worked += 1
    assert worked > 1000


def test_the_base_reads_training_tasks_only_in_both_modes_and_the_same_ones_for_a_seed() -> None:
    tokenizer = demo_tokenizer()
    sequences = list(islice(base_sequences(0), 300))
    again = list(islice(base_sequences(0), 300))
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(sequences, again, strict=True))
    texts = [tokenizer.decode(prompt) for prompt, _ in sequences]
    modes = Counter("parallel" in text for text in texts)
    assert min(modes.values()) > 100
    heldout = {task.question for task in demo_tasks("heldout", 2000, seed=0)}
    assert not any(text.split("\n")[1] in heldout for text in texts)
    assert all(response[-1] == tokenizer.eos_token_id for _, response in sequences)
