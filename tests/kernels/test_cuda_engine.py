"""The engine on a GPU gives the CPU's responses: eager steps with chunks, captured decode steps, forks and joins."""

import pytest
import torch

from npr_engine.engine import Engine, EngineConfig
from npr_engine.model import InferenceModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from tests.unit.engine.random_model import CONFIG, GRAMMAR, random_weights

PROMPTS = [[3, 4, 5 + index % 3] for index in range(24)]


def rollouts(device: str, *, num_kv_slots: int, fp8: bool = False) -> list[Rollout]:
    weights = {name: tensor.to(device) for name, tensor in random_weights(3, torch.float32).items()}
    config = EngineConfig(num_kv_slots=num_kv_slots, block_size=4, max_batch_tokens=64)
    engine = Engine(InferenceModel(CONFIG, weights, fp8=fp8), GRAMMAR, config)
    found = engine.generate(PROMPTS, SamplingParams(max_tokens=90, seed=1, constrain=True))
    engine.check_integrity()
    assert engine.stats().joins > 0
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_slots", [420, 8192])
def test_a_gpu_samples_what_the_cpu_samples(num_kv_slots: int) -> None:
    """With and without preemption. A draw may fall on the border of two tokens: all but one in fifty responses are equal."""
    pairs = list(
        zip(*(rollouts(device, num_kv_slots=num_kv_slots) for device in ("cpu", "cuda")), strict=True)
    )
    equal = [ours.token_ids.tolist() == theirs.token_ids.tolist() for ours, theirs in pairs]
    assert sum(equal) >= len(equal) - 1
    for same, (ours, theirs) in zip(equal, pairs, strict=True):
        if same:
            torch.testing.assert_close(
                torch.from_numpy(ours.logprobs),
                torch.from_numpy(theirs.logprobs),
                equal_nan=True,
                rtol=0,
                atol=1e-4,
            )


@pytest.mark.gpu
def test_a_gpu_in_fp8_samples_valid_responses() -> None:
    assert all(
        rollout.finish_reason in ("eos", "length", "budget")
        for rollout in rollouts("cuda", num_kv_slots=8192, fp8=True)
    )
