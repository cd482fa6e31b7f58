"""Rows that no token has, cut over two tensor-parallel ranks with one row that only makes the parts equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_npr.runtime.process_world import close_world
from tests.support.launch import torchrun, worker_module
from tests.support.padded import EMBEDDING, NUM_PADDED, SIZE, padded_folder, play_round


@pytest.mark.slow
def test_two_ranks_sample_and_train_the_tokens_alone_as_one_does(tmp_path: Path) -> None:
    assert (SIZE + NUM_PADDED) % 2
    model = padded_folder(tmp_path / "model")
    torchrun(worker_module("padded"), (model, tmp_path / "two", 2, tmp_path / "out"), 2)
    two = torch.load(tmp_path / "out", weights_only=False)
    try:
        one = play_round(model, tmp_path / "one")
    finally:
        close_world()
    for ours, theirs, sampled, trained in zip(
        two.rollouts, one.rollouts, two.compared, two.log_probs, strict=True
    ):
        assert ours.token_ids.max() < SIZE
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        np.testing.assert_allclose(trained[sampled], ours.logprobs[sampled], atol=1e-4)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
    before = load_file(model / "model.safetensors")[EMBEDDING]
    assert torch.equal(two.embedding[SIZE:], before[SIZE:])
    assert len(two.embedding) == SIZE + NUM_PADDED and not torch.equal(two.embedding[:SIZE], before[:SIZE])
