"""Qwen3, Qwen2.5, Llama and the real SmolLM2: the logits of transformers, from engine and policy, and the same bits back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.data.packing import TrainSample
from megatron_npr.hf.huggingface import export_model, load_tokenizer, read_model_config
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.training.engine_weights import full_weights
from megatron_npr.training.session import read_shards
from megatron_npr.training.trainer import Trainer
from npr_engine.engine import Engine, EngineConfig
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.model.transformer import InferenceModel
from npr_engine.sampling import SamplingParams
from npr_ext import branch_layout
from tests.support.errors import assert_as_exact_as, assert_log_probs_as_exact_as
from tests.support.families import FAMILIES, save_family
from tests.support.logits.engine import engine_logits
from tests.support.logits.transformers import exact_logits, transformers_logits
from tests.support.training import TAGS

PROMPT = "Write 3 numbers below 1024 and café names:\n\n1. "


@pytest.fixture(scope="module", params=[*FAMILIES, "smollm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2")
    return save_family(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def token_ids(folder: Path) -> Tensor:
    if (folder / "tokenizer.json").exists():
        return torch.tensor(load_tokenizer(folder).encode(PROMPT * 3))
    return torch.from_numpy(np.random.default_rng(1).integers(0, 97, 40))


@pytest.fixture(scope="module")
def expected(folder: Path, token_ids: Tensor) -> Tensor:
    """transformers' logits, float32."""
    return transformers_logits(folder, token_ids)


@pytest.fixture(scope="module")
def exact(folder: Path, token_ids: Tensor) -> Tensor:
    """Logits [T, V] in float64, the truth."""
    return exact_logits(folder, token_ids)


def test_the_engines_logits_are_as_exact_as_transformers(
    folder: Path, token_ids: Tensor, expected: Tensor, exact: Tensor, world: World
) -> None:
    config = read_model_config(folder)
    model = InferenceModel(config, read_shards(folder, config, world, torch.float32))
    assert_as_exact_as(engine_logits(model, token_ids), expected, exact)


def test_the_engine_in_float64_computes_no_more_than_positions_in_float32(
    folder: Path, token_ids: Tensor, exact: Tensor, world: World
) -> None:
    """As transformers' own float64 model, whose norms are float32, too."""
    config = read_model_config(folder)
    model = InferenceModel(config, read_shards(folder, config, world, torch.float64))
    theirs = transformers_logits(folder, token_ids, torch.float64)
    assert_as_exact_as(engine_logits(model, token_ids), theirs, exact)


def test_the_policys_logits_and_log_probs_are_as_exact_as_transformers_and_its_weights_come_back_bit_for_bit(
    folder: Path, token_ids: Tensor, expected: Tensor, exact: Tensor, world: World, tmp_path: Path
) -> None:
    config = read_model_config(folder)
    policy = build_policy(config, world).eval()
    load_policy_weights(policy, folder)
    layout = branch_layout(token_ids, tags=TAGS, prompt_lengths=4, branching=False).as_tensor()
    # Megatron's dispatcher of experts names CUDA; dense models run without the CPU runtime, and by torch's own products.
    runtime = megatron_context() if config.num_experts else contextlib.nullcontext()
    with torch.no_grad(), runtime:
        logits = policy.logits(token_ids[None], layout)[0]
    assert_as_exact_as(logits, expected, exact)
    targets = torch.arange(4, len(token_ids))
    with torch.no_grad(), megatron_context():
        (found,) = policy.chunks[0](
            token_ids[None], layout[:1], layout, labels=token_ids[None], loss_mask=targets
        )
    truth = exact.log_softmax(-1)[targets - 1, token_ids[targets]]
    assert_log_probs_as_exact_as(found, truth, expected, exact)
    export_model(full_weights(policy), config, folder, tmp_path / "again")
    again, before = (load_file(place / "model.safetensors") for place in (tmp_path / "again", folder))
    assert set(again) == set(before)
    for name, weight in again.items():
        assert weight.dtype == before[name].dtype and torch.equal(weight, before[name]), name
    assert read_model_config(tmp_path / "again") == config


def test_trained_log_probs_are_as_exact_as_transformers(
    folder: Path, token_ids: Tensor, expected: Tensor, exact: Tensor, world: World
) -> None:
    policy = build_policy(read_model_config(folder), world)
    load_policy_weights(policy, folder)
    trainer = Trainer(
        policy,
        world,
        optimizer=OptimizerSettings(),
        batch=BatchSettings(),
        tags=TAGS,
        pad_id=0,
        num_updates=1,
    )
    response = token_ids[4:].numpy().astype(np.int32)
    sample = TrainSample(
        token_ids[:4].numpy().astype(np.int32),
        response,
        np.ones(len(response), np.bool_),
        np.zeros(len(response), np.float32),
    )
    (ours,) = trainer.log_probs([sample], branching=False)
    truth = exact[3:-1].log_softmax(-1).gather(1, token_ids[4:, None])[:, 0]
    assert_log_probs_as_exact_as(ours, truth, expected, exact)


def test_smollm2_greedily_continues_as_transformers_does(smollm2: Path, world: World) -> None:
    config = read_model_config(smollm2)
    tokenizer = load_tokenizer(smollm2)
    grammar = Grammar(Vocabulary.from_tokenizer(tokenizer))
    model = InferenceModel(config, read_shards(smollm2, config, world, torch.float32))
    engine = Engine(model, grammar, EngineConfig(num_kv_slots=1024))
    prompts = [tokenizer.encode(text) for text in (PROMPT, "The capital of France is", "2 + 2 =")]
    sampling = SamplingParams(max_tokens=16, temperature=0.0, branching=False, ignore_eos=True)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, rollout in zip(prompts, engine.generate(prompts, sampling), strict=True):
        sequence = torch.tensor([*prompt, *rollout.token_ids.tolist()])
        with torch.no_grad():
            logits = theirs(sequence[None]).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == rollout.token_ids.tolist()
