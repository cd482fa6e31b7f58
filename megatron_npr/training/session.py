"""What every stage stands on: the process world, the tokenizer with its grammar, the run folder.

open_session(config) ──► Session ──► folder_engine (sampling alone)  or  Learner (training; see learner.py)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_npr.config import (
    ModelSettings,
    ParallelSettings,
    RolloutSettings,
    RunSettings,
    StageConfig,
)
from megatron_npr.hf.generation_config import read_vocabulary
from megatron_npr.hf.huggingface import ONE_RANK, load_tokenizer, read_engine_weights, read_model_config
from megatron_npr.model.linears import require_fp8
from megatron_npr.repairs.pytorch import share_cores_with_gloo
from megatron_npr.rollout.engine_groups import engine_groups, engine_layout
from megatron_npr.rollout.sglang_backend import SGLangBackend
from megatron_npr.run_folder.claim import claim
from megatron_npr.runtime.agreement import agree
from megatron_npr.runtime.process_world import World, init_world, join_world, on_every_rank, on_first_rank
from megatron_npr.sharding.layouts import EngineLayout
from npr_engine.backend import Backend
from npr_engine.engine import Engine, EngineConfig
from npr_engine.kvcache.memory_size import require_kv_memory
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.model.linear import Weight
from npr_engine.model.transformer import InferenceModel, ModelConfig
from npr_ext import num_threads
from npr_ext.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Session:
    """One run on this rank; `config` is the whole resolved configuration, `continued` whether it goes on from what its
    folder holds."""

    config: StageConfig
    world: World
    tokenizer: Any
    vocabulary: Vocabulary
    grammar: Grammar
    model_config: ModelConfig
    continued: bool

    @property
    def run(self) -> RunSettings:
        return self.config.run

    @property
    def model(self) -> ModelSettings:
        return self.config.model

    @property
    def parallel(self) -> ParallelSettings:
        return self.config.parallel

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.vocabulary.eos_id if pad is None else pad)


def open_session(config: StageConfig) -> Session:
    """Join the world, read tokenizer and architecture, take the run folder (see `run_folder.claim`); collective."""
    run, model, parallel = config.run, config.model, config.parallel
    _set_threads(run.threads)
    join_world()
    tokenizer, vocabulary, model_config = on_every_rank(lambda: _read_description(model.path))
    agree(
        "start",
        settings=[config.model_dump_json(exclude={"log": True, "run": {"threads"}})],
        model=[repr(model_config)],
        tokenizer=(piece.decode("latin-1") for piece in vocabulary.pieces),
    )
    world = init_world(
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        vpp=parallel.vpp,
        ep=parallel.ep,
        seed=run.seed,
    )
    if model.dtype == "fp8":
        require_fp8(world.device)
    continued = on_first_rank(world, lambda: claim(config))
    return Session(config, world, tokenizer, vocabulary, Grammar(vocabulary), model_config, continued)


def _read_description(folder: Path) -> tuple[Any, Vocabulary, ModelConfig]:
    """What a model's folder says besides its weights."""
    tokenizer = load_tokenizer(folder)
    return tokenizer, read_vocabulary(folder, tokenizer), read_model_config(folder)


def _set_threads(threads: int) -> None:
    """CPU threads of this process: as asked, or the cores shared among the processes of this machine."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = len(os.sched_getaffinity(0))
    ours = threads or max(1, available // local)
    torch.set_num_threads(ours)
    assert num_threads() == ours  # asked before the others': npr_ext takes up the setting at its first use
    share_cores_with_gloo()


def read_shards(
    folder: Path, config: ModelConfig, world: World, dtype: torch.dtype, engine: EngineLayout = ONE_RANK
) -> dict[str, Tensor]:
    """This rank's shards of the weights of a Hugging Face folder, for an engine replica of this layout; collective."""
    rank = world.rank % engine.size
    return on_every_rank(lambda: read_engine_weights(folder, config, dtype, world.device, engine, rank))


def build_engine(session: Session, weights: Mapping[str, Weight], settings: RolloutSettings) -> Backend:
    """Who decodes on this rank: an engine replica over these weights (shared, not copied), or SGLang beside them."""
    if settings.backend == "sglang":
        return _sglang_backend(session, settings)
    layout = engine_layout(settings, session.parallel, session.model_config, session.world.size)
    groups = engine_groups(session.world, layout)
    model = InferenceModel(
        session.model_config,
        weights,
        groups.tp,
        expert_group=groups.experts,
        fp8=settings.fp8,
    )
    require_kv_memory(settings.kv_slots, model.kv_bytes_per_slot, model.device, setting="rollout.kv_slots")
    return Engine(
        model,
        session.grammar,
        EngineConfig(
            num_kv_slots=settings.kv_slots,
            block_size=settings.block_size,
            max_running_requests=settings.max_running_requests,
            max_batch_tokens=settings.max_batch_tokens,
        ),
    )


def folder_engine(session: Session, settings: RolloutSettings) -> Backend:
    """An engine over the weights of model.path itself, where nothing is trained; collective."""
    layout = engine_layout(settings, session.parallel, session.model_config, session.world.size)
    weights = read_shards(session.model.path, session.model_config, session.world, session.dtype, layout)
    return build_engine(session, weights, settings)


def _sglang_backend(session: Session, settings: RolloutSettings) -> Backend:
    """SGLang over the model's folder; the first update brings it the weights of the learner."""
    if settings.branching:
        raise UserError(
            "rollout.backend = 'sglang' decodes plain sequences: set rollout.branching = false or use"
            " rollout.backend = 'native'"
        )
    if settings.fp8:
        raise UserError("rollout.fp8 is of rollout.backend = 'native': set it to false for 'sglang'")
    layout = engine_layout(settings, session.parallel, session.model_config, session.world.size)
    if layout.size > 1:
        raise UserError(
            "rollout.backend = 'sglang' takes whole weights: set rollout.tp = 1 and rollout.ep = 1, not "
            f"{layout.tp} and {layout.ep}"
        )
    return SGLangBackend(
        session.model.path,
        session.model_config,
        settings,
        vocabulary=session.vocabulary,
        dtype=str(session.dtype).removeprefix("torch."),
        gpu=session.world.device.index or 0,
    )
