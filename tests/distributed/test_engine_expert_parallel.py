"""Engines whose experts lie on more ranks than their attention: one process's responses, and transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_npr.runtime.process_world import World
from npr_engine.testing import PIECES
from tests.distributed.workers.expert import LENGTHS, PROMPTS, decode
from tests.support.families import save_family
from tests.support.launch import run_worker
from tests.support.logits.transformers import log_prob_noise, transformers_logits

EVERYTHING = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3_moe", tmp_path_factory.mktemp("model"), vocab_size=len(PIECES))


def decoded(folder: Path, cases: list[Any], processes: int) -> list[Any]:
    """The responses of each case, in one world; see the worker."""
    found: list[Any] = json.loads(run_worker("expert", (folder, json.dumps(cases)), processes))
    return found


@pytest.fixture(scope="module")
def alone(folder: Path, world: World) -> Any:
    """What one process decodes."""
    return decode(folder, world, 1, 1, [EVERYTHING])


@pytest.fixture(scope="module")
def noise(folder: Path, alone: Any) -> float:
    """How far two float32 computations of a log-prob may be apart."""
    return log_prob_noise(folder, torch.tensor([*PROMPTS[2], *alone[2][0][0]]))


def same(found: Any, expected: Any, noise: float) -> None:
    for prompt, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for (tokens, log_probs), (wanted, wanted_log_probs) in zip(mine, theirs, strict=True):
            assert tokens == wanted, prompt
            np.testing.assert_allclose(log_probs, wanted_log_probs, rtol=0, atol=noise)


def test_one_process_decodes_greedily_what_transformers_does(folder: Path, alone: Any, noise: float) -> None:
    for prompt, length, ((tokens, log_probs), _) in zip(PROMPTS, LENGTHS, alone, strict=True):
        assert len(tokens) == length
        logits = transformers_logits(folder, torch.tensor([*prompt, *tokens]))[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
        expected = logits.log_softmax(-1).max(-1).values
        np.testing.assert_allclose(log_probs, expected, rtol=0, atol=noise)


def test_two_copies_share_experts_and_one_of_them_may_have_nothing_to_do(
    folder: Path, alone: Any, noise: float
) -> None:
    """Besides them two ranks of one copy, each with whole experts."""
    cases = [[1, 2, [EVERYTHING, []]], [1, 2, [[3], [4, 2, 1, 0]]], [2, 2, [EVERYTHING]]]
    for found in decoded(folder, cases, 2):
        same(found, alone, noise)


@pytest.mark.slow
def test_four_ranks_share_experts_as_four_copies_and_as_two_of_two_ranks(
    folder: Path, alone: Any, noise: float
) -> None:
    cases = [[1, 4, [[0], [], [1, 2, 4], [3]]], [2, 4, [[2, 0], [1, 3, 4]]], [2, 4, [[], EVERYTHING]]]
    cases.append([1, 2, [[0, 1], [], [], [2, 3, 4]]])  # two groups of two: they need not step together
    for found in decoded(folder, cases, 4):
        same(found, alone, noise)
