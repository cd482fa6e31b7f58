"""What is ours of the SGLang backend: parameters, answers, and errors. SGLang itself needs a GPU and is not run here."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_npr.config import EvalConfig, load_config
from megatron_npr.demo.base import FOLDER
from megatron_npr.hf.huggingface import HuggingFaceWeights, named_tensors, read_model_config
from megatron_npr.rollout.flat_buckets import flat_buckets
from megatron_npr.rollout.sglang_backend import bucket_message, check_ids, rollout_of, sampling_dict
from megatron_npr.runtime.process_world import close_world
from megatron_npr.sharding.catalog import catalog
from megatron_npr.stages import evaluate
from megatron_npr.stages.evaluate import mode_settings
from megatron_npr.training.session import build_engine, open_session
from npr_engine.backend import Backend
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.response_state import Request
from npr_ext.errors import UserError
from tests.support.families import save_family

EOS = 1
PARAMS = SamplingParams(max_tokens=20, branching=False, seed=3)


def request(**changes: Any) -> Request:
    return Request("p/0", np.array([5, 6, 7], np.int32), replace(PARAMS, **changes))


def answer(reason: dict[str, Any]) -> dict[str, Any]:
    """As sglang.Engine.generate gives it with return_logprob=True and skip_tokenizer_init=True."""
    pairs = [(-0.5, 11, None), (-1.5, 12, None), (-0.25, 1, None)]
    return {"output_ids": [11, 12, 1], "meta_info": {"output_token_logprobs": pairs, "finish_reason": reason}}


def test_parameters_are_translated() -> None:
    made = sampling_dict(request(temperature=0.7, top_k=0, stop_token_ids=(9,)), [EOS, 7], ())
    assert (made["max_new_tokens"], made["temperature"], made["top_k"]) == (20, 0.7, -1)
    assert made["stop_token_ids"] == [EOS, 7, 9]
    assert sampling_dict(request(top_k=4), [EOS], ())["top_k"] == 4
    assert sampling_dict(request(ignore_eos=True), [EOS], ())["stop_token_ids"] == []


def test_ids_that_no_token_has_are_forbidden_to_sglang() -> None:
    assert sampling_dict(request(), [EOS], ())["logit_bias"] is None
    bias = sampling_dict(request(), [EOS], [12, 97])["logit_bias"]
    logits = torch.zeros(100).scatter_(
        0, torch.tensor([int(token) for token in bias]), torch.tensor([*bias.values()])
    )
    assert torch.nonzero(logits.log_softmax(0).isneginf()).flatten().tolist() == [12, 97]


def test_an_id_that_no_token_has_is_named_if_sglang_samples_it_all_the_same() -> None:
    rollout = rollout_of(request(), answer({"type": "length", "length": 3}), eos_ids=[EOS], version=4)
    check_ids(rollout, {13})
    with pytest.raises(RuntimeError, match="SGLang sampled 12, which is no id of the tokenizer, in p/0"):
        check_ids(rollout, {12, 13})


def test_seeds_are_those_of_the_request() -> None:
    one, same, other = (sampling_dict(request(seed=seed), [EOS], ())["sampling_seed"] for seed in (3, 3, 4))
    assert one == same != other and 0 <= one < 2**31


@pytest.mark.parametrize(
    "changes", [{"branching": True}, {"repetition_penalty": 1.02}, {"max_critical_path": 5}]
)
def test_what_sglang_cannot_do_is_a_mistake(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(changes))} = .* is for 'native'"):
        sampling_dict(request(**changes), [EOS], ())


@pytest.mark.parametrize(
    "told, reason",
    [
        ({"type": "stop", "matched": 7}, "eos"),
        ({"type": "stop", "matched": 1}, "eos"),
        ({"type": "stop", "matched": 9}, "stopped"),
        ({"type": "length", "length": 20}, "length"),
        ({"type": "abort", "message": "out of memory"}, "error(out of memory)"),
    ],
)
def test_an_answer_becomes_a_rollout(told: dict[str, Any], reason: str) -> None:
    rollout = rollout_of(request(), answer(told), eos_ids=[EOS, 7], version=4)
    assert rollout.finish_reason == reason and rollout.weights_version == 4
    assert rollout.token_ids.tolist() == [11, 12, 1] and rollout.positions.tolist() == [3, 4, 5]
    assert rollout.logprobs.tolist() == rollout.sampler_logprobs.tolist() == [-0.5, -1.5, -0.25]
    assert not rollout.forced.any() and not rollout.branch_ids.any()
    assert rollout.critical_path == rollout.num_tokens == 3
    cooler = rollout_of(request(temperature=0.5), answer(told), eos_ids=[EOS], version=4)
    assert np.isnan(cooler.sampler_logprobs).all() and np.isfinite(cooler.logprobs).all()


@pytest.mark.parametrize("family", ["qwen3 tied", "qwen3_moe"])
def test_weights_reach_sglang_under_the_folders_names_bit_for_bit(family: str, tmp_path: Path) -> None:
    """What SGLang's reader makes of the messages is the Hugging Face folder that the weights came from."""
    folder = save_family(family, tmp_path)
    config = read_model_config(folder)
    with HuggingFaceWeights(folder, config) as source:
        weights = {name: source.full(name) for name in catalog(config)}
    read: dict[str, Tensor] = {}
    sizes = []
    for bucket in flat_buckets(named_tensors(weights, config), bucket_bytes=40_000):
        message = bucket_message(bucket, SimpleNamespace)
        sizes.append(message["flattened_tensor"].nbytes)
        for entry in message["metadata"]:
            bytes_of = message["flattened_tensor"][entry.start_idx : entry.end_idx]
            assert entry.name not in read and entry.numel == len(bytes_of)
            read[entry.name] = bytes_of.view(entry.dtype).reshape(entry.shape)
    saved = load_file(folder / "model.safetensors")
    assert read.keys() == saved.keys() and len(sizes) > 3 and max(sizes) <= 40_000
    assert all(torch.equal(read[name], saved[name]) for name in saved)


def test_fp8_is_not_silently_left_out(tmp_path: Path) -> None:
    overrides = ["--run.dir", str(tmp_path), "--model.path", str(FOLDER), "--eval.problems", "demo"]
    overrides += ["--rollout.backend", "sglang", "--rollout.fp8", "true"]
    config = load_config(EvalConfig, None, overrides)
    try:
        session = open_session(config)
        with pytest.raises(UserError, match=r"rollout\.fp8 is of rollout\.backend = 'native'"):
            build_engine(session, {}, mode_settings(config.rollout, "unforced", 1))
    finally:
        close_world()


@pytest.mark.parametrize(
    "mode, text", [("parallel", "rollout.branching = false"), ("unforced", "extra `sglang`")]
)
def test_the_configuration_chooses_and_says_what_is_missing(mode: str, text: str, tmp_path: Path) -> None:
    if mode == "unforced" and importlib.util.find_spec("sglang") is not None:
        pytest.skip("SGLang is installed")
    overrides = ["--run.dir", str(tmp_path), "--model.path", str(FOLDER), "--eval.problems", "demo"]
    overrides += ["--rollout.backend", "sglang", "--eval.modes", mode, "--eval.count", "1"]
    config = load_config(EvalConfig, None, overrides)
    try:
        with pytest.raises(UserError, match=text):
            evaluate.run(config)
    finally:
        close_world()


def test_the_protocol_stays_small() -> None:
    assert 0 < len([name for name in vars(Backend) if not name.startswith("_")]) <= 5
