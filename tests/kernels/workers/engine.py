"""The engine as a GPU runs it, on Triton's interpreter: what a graph would replay is computed again over the same tensors."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import npr_engine.executor.sampler
import npr_engine.model.transformer
from npr_engine.engine import Engine, EngineConfig
from npr_engine.executor import device_forward
from npr_engine.executor.device_forward import DeviceForward
from npr_engine.executor.device_graph import Recording
from npr_engine.model.transformer import InferenceModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_ext.triton import categorical as triton_categorical
from npr_ext.triton import decoder as triton_decoder
from npr_ext.triton import paged as triton_paged
from tests.support.random_model import CONFIG, GRAMMAR, random_weights

PROMPTS = [[3, 4, 5], [3, 4, 6], [3, 4, 5, 7, 8]]


def again(compute: Callable[[], Tensor]) -> Recording:
    """Stands where a CUDA graph would: inputs and result stay where they are."""
    result = compute().clone()

    def replay() -> None:
        result.copy_(compute())

    return replay, result


def paged_attention(*tensors: Tensor, runs: Tensor | None) -> Tensor:
    return triton_paged.paged_attention(*tensors, tensors[0].shape[-1] ** -0.5, runs)


def use_tritons_kernels() -> None:
    """What npr_ext does for CUDA tensors; small buckets, since the interpreter takes a millisecond for every program."""
    for name in ("add_rms_norm", "rms_norm", "silu_mul", "split_heads"):
        setattr(npr_engine.model.transformer, name, getattr(triton_decoder, name))
    npr_engine.model.transformer.paged_attention = paged_attention
    npr_engine.executor.sampler.categorical = triton_categorical.categorical
    device_forward.MIXED_BUCKETS = (4, 8, 24)
    triton_paged.PROGRAMS_WANTED, triton_categorical.PART = 2, 32


def rollouts(*, on_device: bool) -> tuple[list[Rollout], Engine]:
    weights = random_weights(3, torch.float32)
    weights["output_layer.weight"][GRAMMAR.vocabulary.size :, 0] = (
        3.0  # rows that no token has would be drawn most
    )
    model = InferenceModel(CONFIG, weights)
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=84, block_size=4, max_batch_tokens=24))
    if on_device:
        runner = engine._runner
        runner._on_device = DeviceForward(model, runner._cache, lambda: again)
    found = engine.generate(PROMPTS, SamplingParams(max_tokens=70, seed=131, max_branches=6, constrain=True))
    engine.check_integrity()
    return found, engine


if __name__ == "__main__":
    expected, _ = rollouts(on_device=False)
    use_tritons_kernels()
    found, engine = rollouts(on_device=True)
    stats = engine.stats()
    assert stats.forks and stats.joins and stats.preemptions, stats
    assert stats.graph_steps == stats.steps, stats
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.token_ids.max() < GRAMMAR.vocabulary.size
        assert np.nanmax(np.abs(ours.logprobs - theirs.logprobs)) < 1e-4
    print("equal", stats.steps)
