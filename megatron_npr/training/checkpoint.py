"""Checkpoints: Megatron's dist_checkpointing, `fully_reshardable`, so a run may resume at another TP / PP / DP.

    save: step_000010.writing/ ──(all ranks done: sums, manifest.json)──► rename to step_000010/ ──► `latest` ──► drop old
    resume: `latest` ──► manifest.json ──► every file's sum ──► weights, optimizer, schedule, random state, progress
                 └─ damaged: named, and the one before it is tried

A folder without the suffix is complete, always. An asynchronous save copies the tensors to host memory, forks a process that
writes and sums them, and is published by the first `finish` after that. Progress is the stage's own small record.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_npr.hf.description import copy_description
from megatron_npr.model.policy import Policy, PolicyChunk
from megatron_npr.repairs.megatron_core import OPTIMIZER_STATE, RESULTS_OF_WRITERS
from megatron_npr.repairs.repair import applied
from megatron_npr.run_folder.manifest import (
    DamagedCheckpointError,
    FileSum,
    Manifest,
    candidates,
    complete,
    file_sum,
    find_damage,
    first_whole,
    read_manifest,
    versions,
    write_manifest,
)
from megatron_npr.runtime.latest import point_to
from megatron_npr.runtime.process_world import World, megatron_context, on_first_rank
from megatron_npr.training.optimizer_state import (
    allocate_optimizer_state,
    own_settings,
    regrouped_state,
)
from megatron_npr.training.pickled_files import check_pickled_files, plain_objects
from megatron_npr.training.trainer import Trainer
from npr_ext.errors import UserError

DESCRIPTION = "model"
"""Folder inside a checkpoint: config.json and tokenizer, so that it can be exported without the model that it began from."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: int,
        model_folder: Path,
        config: Mapping[str, Any],
        asynchronous: bool = False,
    ) -> None:
        """`model_folder` describes the model (config.json, tokenizer), `config` is the resolved configuration as JSON."""
        self._folder, self._world, self._keep = folder, world, keep
        self._model_folder, self._config = model_folder, config
        self._queue = AsyncCallsQueue() if asynchronous else None

    def save(self, step: int, trainer: Trainer, progress: dict[str, Any]) -> Path:
        """Write the state after `step` steps; collective. An interrupted save leaves the previous one in place.

        Asynchronous: returns when the state is copied; the folder appears with a later `finish`.
        """
        self.finish(wait=True)
        final = self._folder / f"step_{step:06d}"
        staging = final.with_suffix(".writing")
        if self._world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        waits = () if self._queue is not None else (RESULTS_OF_WRITERS,)
        with megatron_context(), applied(*waits):
            metadata = _metadata()
            request = dist_checkpointing.save(
                _state(trainer, metadata, is_loading=False),
                str(staging),
                content_metadata=_storable(metadata),
                async_sharded_save=True,
            )
            assert isinstance(request, AsyncRequest)
            if request.async_fn is not None:
                # A rank whose tensors others hold, too, has nothing to write.
                request = request._replace(
                    async_fn=partial(_write_and_sum, request.async_fn, staging, self._world.rank)
                )
            unsummed = Manifest(
                step, dataclasses.asdict(trainer.policy.model_config), self._config, progress, versions(), {}
            )
            request.add_finalize_fn(partial(self._publish, staging, final, unsummed))
            if self._queue is None:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)
        return final

    def finish(self, *, wait: bool) -> None:
        """Publish an asynchronous save that is done, or wait for it; collective."""
        if self._queue is not None:
            with megatron_context():
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def resume(self, trainer: Trainer) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest whole checkpoint in place; (step, progress), or None where none was ever completed.

        What is damaged or half written is named in a line and skipped. UserError where all that were complete are damaged.
        """
        interrupted = sorted(self._folder.glob("step_*.writing"))
        paths = on_first_rank(self._world, lambda: candidates(self._folder))
        restored, damaged = first_whole(paths, lambda path: self.load(path, trainer))
        if self._world.is_main:
            for line in [f"{path.name}: the save was interrupted" for path in interrupted] + damaged:
                print(f"npr: checkpoint skipped: {line}", file=sys.stderr, flush=True)
        if damaged and restored is None:
            raise UserError(
                f"no whole checkpoint is left in {self._folder} ({damaged[0]}): restore one from a copy, "
                "or remove the folder and start again"
            )
        return restored

    def load(self, path: Path, trainer: Trainer) -> tuple[int, dict[str, Any]]:
        """Restore the state in place; (step, progress). The optimizer's settings stay those that the trainer was made with.

        DamagedCheckpointError (before anything is touched) where a file is not as written, UserError for a checkpoint of
        another model.
        """
        manifest = self.verified(path)
        ours = json.loads(json.dumps(dataclasses.asdict(trainer.policy.model_config)))
        different = [name for name, value in ours.items() if manifest.model.get(name) != value]
        if different:
            name = different[0]
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {manifest.model.get(name)} there and {ours[name]} "
                "here; start in another run.dir or give the model that it was made from"
            )
        with megatron_context():
            state = _read(path, _state(trainer, _metadata(), is_loading=True))
            for key, chunk in _chunks(trainer.policy).items():
                chunk.load_state_dict(state[key])
            with applied(*OPTIMIZER_STATE), own_settings(trainer.optimizer):
                trainer.optimizer.load_state_dict(regrouped_state(state["optimizer"], trainer.optimizer))
            trainer.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch_rng"])
        return manifest.step, dict(manifest.progress)

    def verified(self, path: Path) -> Manifest:
        """The manifest of a checkpoint whose files are all as written; each rank reads its share of them."""
        manifest = on_first_rank(self._world, lambda: read_manifest(path))
        mine = sorted(manifest.files)[self._world.rank :: self._world.size]
        found: list[str | None] = [None] * self._world.size
        dist.all_gather_object(found, find_damage(path, manifest, mine))
        damage = next((line for line in found if line is not None), None)
        if damage is not None:
            raise DamagedCheckpointError(f"{path.name}: {damage}")
        return manifest

    def _publish(self, staging: Path, final: Path, unsummed: Manifest) -> None:
        """All ranks have written: describe the model, sum what is left, write the manifest, rename, point to it."""
        if self._world.is_main:
            description = staging / DESCRIPTION
            description.mkdir()
            copy_description(self._model_folder, description)
            write_manifest(staging, dataclasses.replace(unsummed, files=_collect_sums(staging)))
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            point_to(final)
            _sync_folder(self._folder)
            self._drop_old(final)
        dist.barrier()

    def _drop_old(self, newest: Path) -> None:
        """Keep the last few. Those of later steps are of another history of the run and go first; so do broken-off saves."""
        order = sorted(complete(self._folder), key=lambda path: (path.name <= newest.name, path.name))
        for path in (*order[: -self._keep], *self._folder.glob("step_*.writing")):
            shutil.rmtree(path)


def _write_and_sum(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Megatron's writing of this rank's files, then their sums; runs in the forked process of an asynchronous save."""
    write(*args, **kwargs)
    sums = {path.name: dataclasses.asdict(file_sum(path)) for path in folder.glob(f"__{rank}_*")}
    (folder / f"{rank}.sums").write_text(json.dumps(sums))


def _collect_sums(folder: Path) -> dict[str, FileSum]:
    """Sums of all files: those that the ranks left, which are removed, and ours of the small rest."""
    sums: dict[str, FileSum] = {}
    for path in folder.glob("*.sums"):
        sums.update({name: FileSum(**entry) for name, entry in json.loads(path.read_text()).items()})
        path.unlink()
    rest = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return sums | {name: file_sum(path) for name, path in rest.items() if name not in sums}


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights(path: Path, policy: Policy) -> None:
    """Fill a policy of any layout from a checkpoint's weights, nothing else of it; collective."""
    with megatron_context():
        metadata = _metadata()
        chunks = _chunks(policy)
        state = _read(
            path, {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in chunks.items()}
        )
        for key, chunk in chunks.items():
            chunk.load_state_dict(state[key])


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The sharded state `wanted`, filled from a checkpoint whose pickled files hold plain data only."""
    check_pickled_files(path)
    try:
        with plain_objects(path):
            state: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    except CheckpointingException as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    return state


def _chunks(policy: Policy) -> dict[str, PolicyChunk]:
    """Chunks under Megatron's keys. Files know global layer numbers only, so a run may resume with other chunks."""
    chunks = policy.chunks
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
    allocate_optimizer_state(trainer.optimizer)
    model = {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _chunks(trainer.policy).items()
    }
    with applied(*OPTIMIZER_STATE):
        optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {
        **model,
        "optimizer": optimizer,
        "schedule": trainer.schedule.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
