"""The engine on a GPU gives the CPU's responses: eager steps with chunks, captured decode steps, forks and joins."""

from functools import partial

import pytest
import torch

from megatron_npr.bench.gpu.timing import waits
from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from tests.support.random_model import CONFIG, GRAMMAR, random_weights

PROMPTS = [[3, 4, 5 + index % 3] for index in range(24)]


def rollouts(device: str, *, num_kv_slots: int, fp8: bool = False) -> list[Rollout]:
    weights = {name: tensor.to(device) for name, tensor in random_weights(3, torch.float32).items()}
    config = EngineConfig(num_kv_slots=num_kv_slots, block_size=4, max_batch_tokens=64)
    engine = Engine(InferenceModel(CONFIG, weights, fp8=fp8), GRAMMAR, config)
    found = engine.generate(PROMPTS, SamplingParams(max_tokens=90, seed=1, constrain=True))
    engine.check_integrity()
    stats = engine.stats()
    assert stats.joins > 0
    assert stats.graph_steps == (stats.steps if device == "cuda" else 0), stats
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


@pytest.mark.gpu
def test_the_host_waits_once_a_step_for_the_sampled_tokens() -> None:
    """A decode step, and one that forks or joins; the longer run has as many waits more as it has steps."""
    weights = {name: tensor.cuda() for name, tensor in random_weights(3, torch.float32).items()}
    engine = Engine(InferenceModel(CONFIG, weights), GRAMMAR, EngineConfig(num_kv_slots=8192))
    counted = []
    for max_tokens in (90, 40, 40, 90):  # the first ones compile and capture
        sampling = SamplingParams(max_tokens=max_tokens, seed=1, constrain=True)
        before = engine.stats()
        waited = waits(partial(engine.generate, PROMPTS, sampling), torch.device("cuda"))
        after = engine.stats()
        counted.append((after.steps - before.steps, len(waited), after.joins - before.joins))
    *_, (few, few_waits, _), (many, many_waits, joins) = counted
    assert joins > 0 and many > few
    assert 0 < many_waits - few_waits <= many - few
