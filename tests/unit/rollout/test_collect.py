"""A rollout as it is trained on: which of its tokens carry loss."""

import numpy as np

from megatron_npr.rollout.collect import train_sample
from tests.support.report_sample import rollout


def test_forced_tokens_carry_no_loss_unless_they_are_asked_to() -> None:
    sampled, _ = rollout()
    assert 0 < sampled.forced.sum() < sampled.num_tokens
    sample = train_sample(sampled, 0.5)
    assert np.array_equal(sample.loss_mask, ~sampled.forced)
    assert np.array_equal(sample.response_ids, sampled.token_ids) and sample.advantage == 0.5
    assert train_sample(sampled, 0.5, train_forced=True).loss_mask.all()
