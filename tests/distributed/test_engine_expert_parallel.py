"""Engines whose experts lie on more ranks than their attention: one process's responses, and transformers' logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_npr.parallel import init_world
from npr_engine.testing import PIECES
from tests.distributed.expert_worker import LENGTHS, PROMPTS, decode
from tests.families import save_family

WORKER = Path(__file__).with_name("expert_worker.py")
EVERYTHING = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3_moe", tmp_path_factory.mktemp("model"), vocab_size=len(PIECES))


def decoded(folder: Path, cases: list[Any], processes: int, out: Path) -> list[Any]:
    """The responses of each case, in one world; see the worker."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), json.dumps(cases), str(out)],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures: list[Any] = json.loads(out.read_text())
    return figures


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process decodes. Its world is left open: Megatron's groups are made once a process."""
    return decode(folder, init_world(), 1, 1, [EVERYTHING])


def same(found: Any, expected: Any) -> None:
    for prompt, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for (tokens, log_probs), (wanted, wanted_log_probs) in zip(mine, theirs, strict=True):
            assert tokens == wanted, prompt
            np.testing.assert_allclose(log_probs, wanted_log_probs, atol=1e-5)


def test_one_process_decodes_greedily_what_transformers_does(folder: Path, alone: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, length, ((tokens, log_probs), _) in zip(PROMPTS, LENGTHS, alone, strict=True):
        assert len(tokens) == length
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
        expected = logits.log_softmax(-1).max(-1).values
        np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_two_copies_share_experts_and_one_of_them_may_have_nothing_to_do(
    folder: Path, alone: Any, tmp_path: Path
) -> None:
    """Also two ranks of one copy, each with whole experts."""
    cases = [[1, 2, [EVERYTHING, []]], [1, 2, [[3], [4, 2, 1, 0]]], [2, 2, [EVERYTHING]]]
    for found in decoded(folder, cases, 2, tmp_path / "out.json"):
        same(found, alone)


@pytest.mark.slow
def test_four_ranks_share_experts_as_four_copies_and_as_two_of_two_ranks(
    folder: Path, alone: Any, tmp_path: Path
) -> None:
    cases = [[1, 4, [[0], [], [1, 2, 4], [3]]], [2, 4, [[2, 0], [1, 3, 4]]], [2, 4, [[], EVERYTHING]]]
    cases.append([1, 2, [[0, 1], [], [], [2, 3, 4]]])  # two groups of two: they need not step together
    for found in decoded(folder, cases, 4, tmp_path / "out.json"):
        same(found, alone)
