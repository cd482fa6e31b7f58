"""A training checkpoint as a Hugging Face folder: `npr convert --from RUN`, in one process, at whatever layout it was trained.

run folder ──► newest whole checkpoint ──► its manifest's architecture ──► policy of one process ──► folder with the tokenizer
"""

from __future__ import annotations

from pathlib import Path

from megatron_npr.hf.convert import Conversion
from megatron_npr.hf.huggingface import export_model
from megatron_npr.hf.model_folder import check_target
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import local_weights
from megatron_npr.run_folder.manifest import MANIFEST, candidates, complete, first_whole
from megatron_npr.runtime.process_world import init_world
from megatron_npr.training.checkpoint import DESCRIPTION, Checkpoints, load_weights
from megatron_npr.training.session import DTYPES
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError


def holds_checkpoints(source: Path) -> bool:
    """Whether `source` is a checkpoint, a folder of them, or a run's folder."""
    return (source / MANIFEST).is_file() or _checkpoint_folder(source) is not None


def convert_checkpoint(source: Path, target: Path, *, force: bool = False) -> Conversion:
    """Write the weights of a checkpoint with the tokenizer that it carries; UserError where none is whole."""
    check_target(target, replace=force)  # before the work
    world = init_world()
    folder = _checkpoint_folder(source)
    checkpoints = Checkpoints(folder or source.parent, world, keep=1, model_folder=source, config={})
    found, damaged = first_whole(
        [source] if folder is None else candidates(folder), lambda path: (path, checkpoints.verified(path))
    )
    if found is None:
        raise UserError(f"no checkpoint is whole: {damaged[0]}; name another one")
    path, manifest = found
    dtype = DTYPES[manifest.config["model"]["dtype"]]
    policy = build_policy(ModelConfig.of(manifest.model), world, dtype=dtype)
    load_weights(path, policy)
    weights = local_weights(policy)
    export_model(weights, policy.model_config, path / DESCRIPTION, target, replace=force)
    return Conversion(target, dtype, sum(weight.numel() for weight in weights.values()), ())


def _checkpoint_folder(source: Path) -> Path | None:
    """The folder of checkpoints that `source` is or has."""
    places = (source, source / "checkpoints")
    return next((place for place in places if complete(place)), None)
