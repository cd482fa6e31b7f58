"""Output rows that no token has: padding behind the tokenizer, holes in it. No sampler draws them, and log-probs are those of a
model without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_engine.engine import Engine, EngineConfig
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.model.transformer import InferenceModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.testing import EOS, VOCABULARY
from tests.support.random_model import CONFIG, GRAMMAR, NUM_TOKEN_IDS, random_weights

SIZE = GRAMMAR.vocabulary.size
HOLES = (11, SIZE - 3)  # " ", and a piece that is text
PROMPTS = [[3, 4, 5], [3, 4, 6]]
OUTPUT = "output_layer.weight"

SAMPLING = {
    "plain": {"branching": False},
    "branching": {},
    "greedy": {"temperature": 0.0},
    "cool": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "penalty": {"repetition_penalty": 1.4},
    "constrained": {"constrain": True},
    "all": {
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "constrain": True,
    },
}


def grammar(holes: tuple[int, ...] = (), extra: int = 0) -> Grammar:
    """That of the random model with ids that no token has, or with tokens for the padding behind it, too."""
    pieces = [None if token in holes else piece for token, piece in enumerate(GRAMMAR.vocabulary.pieces)]
    return Grammar(Vocabulary([*pieces, *["x"] * extra], EOS, VOCABULARY.tags))


def rollouts(weights: dict[str, Tensor], language: Grammar, **sampling: object) -> list[Rollout]:
    config = replace(CONFIG, vocab_size=len(weights[OUTPUT]))
    engine = Engine(InferenceModel(config, weights), language, EngineConfig(num_kv_slots=512))
    params = SamplingParams(**{"max_tokens": 60, "seed": 5, "max_branches": 6, **sampling})  # type: ignore[arg-type]
    return engine.generate(PROMPTS, params)


def liked(tokens: range | tuple[int, ...]) -> dict[str, Tensor]:
    """Weights under which these ids are what the model wants to say."""
    weights = random_weights(3)
    weights[OUTPUT][list(tokens), 0] = 9.0 / 2.8
    return weights


def check_equal(ours: list[Rollout], truth: list[Rollout], unused: set[int]) -> None:
    for one, other in zip(ours, truth, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one.sampler_logprobs, other.sampler_logprobs, rtol=1e-6, atol=1e-6)
        assert not unused & set(one.token_ids.tolist())


@pytest.mark.parametrize("name", SAMPLING)
def test_padding_behind_the_tokenizer_changes_no_rollout(name: str) -> None:
    padding = range(SIZE, NUM_TOKEN_IDS)
    weights = liked(padding)
    cut = {**weights, OUTPUT: weights[OUTPUT][:SIZE]}
    cut["embedding.word_embeddings.weight"] = weights["embedding.word_embeddings.weight"][:SIZE]
    ours, truth = (rollouts(each, GRAMMAR, **SAMPLING[name]) for each in (weights, cut))
    check_equal(ours, truth, set(padding))


@pytest.mark.parametrize("name", SAMPLING)
def test_holes_in_the_tokenizer_are_never_drawn(name: str) -> None:
    """The truth is a model that wants to say anything rather than them."""
    unwanted = random_weights(3)
    unwanted[OUTPUT][list(HOLES)] = 0.0
    unwanted[OUTPUT][list(HOLES), 0] = -1e6
    ours = rollouts(liked(HOLES), grammar(HOLES), **SAMPLING[name])
    check_equal(ours, rollouts(unwanted, grammar(), **SAMPLING[name]), set(HOLES))


def test_the_model_would_have_drawn_them() -> None:
    padding = range(SIZE, NUM_TOKEN_IDS)
    drawn = [
        rollouts(liked(padding), grammar(extra=len(padding))),
        rollouts(liked(HOLES), grammar()),
    ]
    for found, unused in zip(drawn, (set(padding), set(HOLES)), strict=True):
        assert sum(token in unused for rollout in found for token in rollout.token_ids.tolist()) > 10


def test_a_row_that_no_token_has_may_hold_anything() -> None:
    weights = random_weights(3)
    truth = rollouts(weights, GRAMMAR)
    weights[OUTPUT][SIZE:] = torch.nan
    check_equal(rollouts(weights, GRAMMAR), truth, set(range(SIZE, NUM_TOKEN_IDS)))
