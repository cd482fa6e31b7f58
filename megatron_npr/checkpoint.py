"""Checkpoints: Megatron's dist_checkpointing, `fully_reshardable`, so a run may resume at another TP / PP / DP.

    save: step_000010.writing/ ──(all ranks done)──► rename to step_000010/ ──► `latest` replaced ──► old ones dropped
    load: `latest` ──► step_000010/ ──► weights, optimizer, schedule, torch's random state, progress

A folder without the suffix is complete, always. Progress is the stage's own small record (step, data cursor, counters).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_npr.optimizer_state import allocate_optimizer_state, regrouped_state, repaired_optimizer_state
from megatron_npr.parallel import World, megatron_context
from megatron_npr.policy import PolicyChunk
from megatron_npr.trainer import Trainer
from npr_ext.errors import UserError

POINTER = "latest"
MANIFEST = "npr.json"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, world: World, *, keep: int) -> None:
        self._folder, self._world, self._keep = folder, world, keep

    def save(self, step: int, trainer: Trainer, progress: dict[str, Any]) -> Path:
        """Write the state after `step` steps; collective. An interrupted save leaves the previous one in place."""
        final = self._folder / f"step_{step:06d}"
        staging = final.with_suffix(".writing")
        if self._world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        with megatron_context():
            metadata = _metadata()
            dist_checkpointing.save(
                _state(trainer, metadata, is_loading=False),
                str(staging),
                content_metadata=_storable(metadata),
            )
        if self._world.is_main:
            manifest = {
                "step": step,
                "model": dataclasses.asdict(trainer.policy.model_config),
                "progress": progress,
            }
            (staging / MANIFEST).write_text(json.dumps(manifest))
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._point_to(final)
            self._drop_old()
        dist.barrier()
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self._folder / POINTER
        if not pointer.exists():
            return None
        path = self._folder / pointer.read_text().strip()
        if not (path / MANIFEST).exists():
            raise UserError(
                f"{pointer} names {path.name}, which is not a complete checkpoint: remove {pointer} or restore it"
            )
        return path

    def load(self, path: Path, trainer: Trainer) -> tuple[int, dict[str, Any]]:
        """Restore the state in place; (step, progress). UserError for a checkpoint of another model."""
        manifest = json.loads((path / MANIFEST).read_text())
        ours = dataclasses.asdict(trainer.policy.model_config)
        different = [name for name, value in ours.items() if manifest["model"].get(name) != value]
        if different:
            name = different[0]
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {manifest['model'].get(name)} there and {ours[name]} "
                "here; start in another run.dir or give the model that it was made from"
            )
        with megatron_context():
            metadata = _metadata()
            try:
                state = dist_checkpointing.load(_state(trainer, metadata, is_loading=True), str(path))
            except CheckpointingException as error:
                raise UserError(f"checkpoint {path} cannot be read: {error}") from error
            for key, chunk in _chunks(trainer).items():
                chunk.load_state_dict(state[key])
            with repaired_optimizer_state():
                trainer.optimizer.load_state_dict(regrouped_state(state["optimizer"], trainer.optimizer))
            trainer.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch_rng"])
        return int(manifest["step"]), manifest["progress"]

    def _point_to(self, path: Path) -> None:
        pointer = self._folder / POINTER
        written = pointer.with_suffix(".new")
        written.write_text(path.name + "\n")
        os.replace(written, pointer)

    def _drop_old(self) -> None:
        complete = sorted(path for path in self._folder.glob("step_??????") if path.is_dir())
        for path in complete[: -self._keep]:
            shutil.rmtree(path)


def _chunks(trainer: Trainer) -> dict[str, PolicyChunk]:
    """Chunks under Megatron's keys. Files know global layer numbers only, so a run may resume with other chunks."""
    chunks = trainer.policy.chunks
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": each for i, each in enumerate(chunks)}


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _storable(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != "dp_cp_group"}


def _state(trainer: Trainer, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    allocate_optimizer_state(trainer.optimizer)
    model = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _chunks(trainer).items()}
    with repaired_optimizer_state():
        optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {
        **model,
        "optimizer": optimizer,
        "schedule": trainer.schedule.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
