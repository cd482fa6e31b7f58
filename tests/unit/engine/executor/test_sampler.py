"""The sampler: which distribution is drawn from, and that draws follow identities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_engine.executor.sampler import sample
from npr_engine.scheduler.batch import Sampled, SampleInputs
from npr_engine.scheduler.draws import uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0, -torch.inf, 0.0], dtype=torch.float64)
PROBS = LOGITS.softmax(0).numpy()
DRAWS = 20_000


def inputs(rows: int, penalised: list[int] | None = None, **changes: float) -> SampleInputs:
    """Equal parameters for all rows, uniform numbers on a grid."""
    fields: dict[str, Any] = {
        "temperature": np.full(rows, changes.get("temperature", 1.0), np.float32),
        "top_p": np.full(rows, changes.get("top_p", 1.0), np.float32),
        "top_k": np.full(rows, changes.get("top_k", 0), np.int32),
        "min_p": np.full(rows, changes.get("min_p", 0.0), np.float32),
        "penalty": np.full(rows, changes.get("penalty", 1.0), np.float32),
        "penalised": np.tile(np.array(penalised or [], np.int32), (rows, 1)),
        "masks": np.zeros(rows, np.int32),
    }
    return SampleInputs(uniforms=(np.arange(rows) + 0.5) / rows, **fields)


def draw(logits: Tensor = LOGITS, **changes: Any) -> tuple[np.ndarray, Sampled]:
    """Shares of the tokens over a grid of uniform numbers, and the sample."""
    drawn = sample(logits.expand(DRAWS, -1), inputs(DRAWS, **changes))
    return np.bincount(drawn.token_ids, minlength=len(logits)) / DRAWS, drawn


def restricted(probs: np.ndarray, keep: list[int]) -> np.ndarray:
    """Probabilities of some tokens, renormalised."""
    kept = np.zeros_like(probs)
    kept[keep] = probs[keep]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, PROBS),
        ({"temperature": 0.5}, (LOGITS / 0.5).softmax(0).numpy()),
        ({"top_k": 2}, restricted(PROBS, [4, 0])),
        ({"top_k": 100}, PROBS),
        ({"top_p": PROBS[4] - 0.01}, restricted(PROBS, [4])),
        ({"top_p": PROBS[4] + 0.01}, restricted(PROBS, [4, 0])),
        ({"min_p": 0.2}, restricted(PROBS, [4, 0])),
        ({"top_k": 3, "top_p": 0.9}, restricted(PROBS, [4, 0])),
        ({"temperature": 0.0}, restricted(PROBS, [4])),
    ],
)
def test_draws_follow_the_distribution_that_was_asked_for(
    changes: dict[str, float], expected: np.ndarray
) -> None:
    shares, drawn = draw(**changes)
    np.testing.assert_allclose(shares, expected, atol=2 / DRAWS)
    np.testing.assert_allclose(np.exp(drawn.logprobs), PROBS[drawn.token_ids], rtol=1e-6)
    np.testing.assert_allclose(np.exp(drawn.sampler_logprobs), expected[drawn.token_ids], rtol=1e-6)


def test_the_penalty_lowers_tokens_of_the_step_and_leaves_the_policys_log_probs() -> None:
    lowered = LOGITS.clone()
    lowered[4] /= 1.5
    lowered[3] *= 1.5
    shares, drawn = draw(penalised=[4, 3, 4, -1], penalty=1.5)
    np.testing.assert_allclose(shares, lowered.softmax(0).numpy(), atol=2 / DRAWS)
    np.testing.assert_allclose(np.exp(drawn.logprobs), PROBS[drawn.token_ids], rtol=1e-6)


def test_masked_tokens_have_no_probability_under_sampler_or_policy() -> None:
    forbidden = torch.tensor([[False] * 7, [False, True, False, False, True, False, True]])
    masked = inputs(DRAWS)
    masked.masks[:] = 1
    drawn = sample(LOGITS.expand(DRAWS, -1), masked, forbidden)
    expected = restricted(PROBS, [0, 2, 3])
    shares = np.bincount(drawn.token_ids, minlength=7) / DRAWS
    np.testing.assert_allclose(shares, expected, atol=2 / DRAWS)
    for logprobs in (drawn.logprobs, drawn.sampler_logprobs):
        np.testing.assert_allclose(np.exp(logprobs), expected[drawn.token_ids], rtol=1e-6)
    masked.masks[0] = 0
    unmasked = sample(LOGITS.expand(DRAWS, -1), masked, forbidden)
    np.testing.assert_allclose(np.exp(unmasked.logprobs[0]), PROBS[unmasked.token_ids[0]], rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}])
def test_a_row_without_a_distribution_is_flagged_and_leaves_the_others(
    value: float, changes: dict[str, float]
) -> None:
    logits = LOGITS.repeat(4, 1)
    sound = sample(logits, inputs(4, **changes))
    logits[2, 3] = value
    logits[1] = -torch.inf
    drawn = sample(logits, inputs(4, **changes))
    assert not sound.invalid.any() and drawn.invalid.tolist() == [False, True, True, False]
    assert drawn.token_ids[[0, 3]].tolist() == sound.token_ids[[0, 3]].tolist()
    assert drawn.logprobs[[0, 3]].tolist() == sound.logprobs[[0, 3]].tolist()


def test_rows_keep_their_own_parameters() -> None:
    mixed = inputs(3)
    mixed.temperature[:] = [0.0, 1.0, 1.0]
    mixed.top_k[:] = [0, 1, 0]
    mixed.uniforms[:] = 0.0
    assert sample(LOGITS.expand(3, -1), mixed).token_ids.tolist() == [4, 4, 0]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]]).expand(2, -1)
    edge = inputs(2)
    edge.uniforms[:] = [0.0, 1 - 2.0**-53]
    assert sample(logits, edge).token_ids.tolist() == [0, 0]


def test_uniform_numbers_depend_on_key_and_position_alone() -> None:
    keys = np.arange(1000, dtype=np.uint64) * np.uint64(7919)
    positions = np.arange(1000, dtype=np.int32) % 50
    together = uniforms(keys, positions)
    assert [uniforms(keys[i : i + 1], positions[i : i + 1])[0] for i in (0, 500, 999)] == together[
        [0, 500, 999]
    ].tolist()
    assert len(set(together)) == 1000 and together.min() >= 0 and together.max() < 1
    assert abs(together.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(together[1:], together[:-1])[0, 1]) < 0.1
