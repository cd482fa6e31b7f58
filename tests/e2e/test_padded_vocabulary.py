"""A model with more vocabulary rows than its tokenizer has ids, and one whose responses end in two ways: engine, trainer,
evaluation and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_npr.config import EvalConfig, load_config
from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.huggingface import load_tokenizer
from megatron_npr.rollout.rollout_file import read_rollouts
from megatron_npr.runtime.process_world import close_world
from megatron_npr.server.served_model import load_model
from megatron_npr.stages import evaluate
from npr_engine.language.grammar import Grammar
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from tests.support.padded import EMBEDDING, NUM_PADDED, SIZE, Round, padded_folder, play_round


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    yield
    close_world()


def played(folder: Path, run: Path) -> Round:
    try:
        return play_round(folder, run)
    finally:
        close_world()


def test_rows_behind_the_tokenizer_change_neither_rollouts_nor_training(tmp_path: Path) -> None:
    """The truth is the same model without these rows; float32 sums of log-probs and gradients alone may differ by order."""
    padded = padded_folder(tmp_path / "padded")
    ours = played(padded, tmp_path / "ours")
    truth = played(padded_folder(tmp_path / "plain", num_padded=0), tmp_path / "truth")
    for one, other, sampled, trained, true in zip(
        ours.rollouts, truth.rollouts, ours.compared, ours.log_probs, truth.log_probs, strict=True
    ):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.token_ids.max() < SIZE
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(trained[sampled], one.logprobs[sampled], atol=1e-4)
        np.testing.assert_allclose(trained, true, atol=1e-5)
    assert ours.grad_norm == pytest.approx(truth.grad_norm, rel=1e-4)
    before = load_embedding(padded)
    assert len(before) == len(ours.embedding) == SIZE + NUM_PADDED
    assert torch.equal(ours.embedding[SIZE:], before[SIZE:]), "rows that no token has have no gradient"
    assert not torch.equal(ours.embedding[:SIZE], before[:SIZE])


def load_embedding(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[EMBEDDING]


def evaluated(folder: Path, run: Path) -> list[Rollout]:
    """The rollouts of `npr eval`, each a plain sequence."""
    overrides = ["--run.dir", str(run), "--run.threads", "1", "--model.path", str(folder)]
    overrides += ["--eval.problems", "demo", "--eval.count", "4", "--eval.samples_per_problem", "4"]
    overrides += ["--eval.modes", "unforced", "--rollout.max_tokens", "200", "--rollout.top_p", "1.0"]
    config = load_config(EvalConfig, None, overrides)
    try:
        evaluate.run(config)
    finally:
        close_world()
    figures = json.loads((run / "eval.json").read_text())["modes"]["unforced"]
    rollouts = read_rollouts(run / "rollouts.jsonl")
    assert sum(figures["finish_reasons"].values()) == len(rollouts) == 16
    return rollouts


def check_ends(rollouts: list[Rollout], eos_ids: tuple[int, ...]) -> None:
    """Some end with each id, and none goes on behind one."""
    ended = [rollout for rollout in rollouts if rollout.finish_reason == "eos"]
    assert {int(rollout.token_ids[-1]) for rollout in ended} == set(eos_ids) and len(eos_ids) == 2
    for rollout in rollouts:
        assert rollout.token_ids.max() < SIZE
        assert not set(rollout.token_ids[:-1].tolist()) & set(eos_ids)


def test_npr_eval_ends_a_response_at_each_eos_and_writes_what_it_sampled(tmp_path: Path) -> None:
    folder = padded_folder(tmp_path / "model", second_eos=True)
    check_ends(evaluated(folder, tmp_path / "eval"), read_vocabulary(folder, load_tokenizer(folder)).eos_ids)


def test_without_its_name_an_id_ends_nothing(tmp_path: Path) -> None:
    folder = padded_folder(tmp_path / "model", second_eos=True)
    pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
    (folder / "generation_config.json").unlink()
    rollouts = evaluated(folder, tmp_path / "eval")
    assert any(pad in rollout.token_ids[:-1] for rollout in rollouts), "the other tests need such responses"


def test_constrained_responses_end_at_each_eos_and_are_valid_by_either(tmp_path: Path) -> None:
    folder = padded_folder(tmp_path / "model", second_eos=True)
    model = load_model(folder, name=None, dtype=torch.float32, kv_slots=8192)
    prompt = model.tokenizer.encode("Sort by cost: pen=5*6, cup=13*5\nWork in parallel")
    params = SamplingParams(max_tokens=300, max_branches=4, constrain=True, seed=2)
    rollouts = model.engine.generate([prompt] * 16, params)
    check_ends(rollouts, model.vocabulary.eos_ids)
    for rollout in rollouts:
        if rollout.finish_reason == "eos":
            assert Grammar(model.vocabulary).read(rollout.token_ids).defect is None
