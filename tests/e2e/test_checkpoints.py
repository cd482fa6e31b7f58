"""What happens to a checkpoint on the disk: any damage is found, named and passed over; nothing in it is run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_npr.cli import main
from megatron_npr.run_folder.manifest import (
    DamagedCheckpointError,
    candidates,
    file_sum,
    read_manifest,
    write_manifest,
)
from megatron_npr.runtime.process_world import World, init_world
from megatron_npr.training.checkpoint import Checkpoints
from megatron_npr.training.checkpoint_export import convert_checkpoint
from megatron_npr.training.offload import optimizer_tensors
from npr_ext.errors import UserError
from tests.support.families import FAMILIES, save_family
from tests.support.training import new_trainer, step

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3 tied", tmp_path_factory.mktemp("model"))


def checkpoints_in(folder: Path, world: World, model_folder: Path, **options: bool) -> Checkpoints:
    return Checkpoints(
        folder, world, keep=3, model_folder=model_folder, config={"run": {"seed": 7}}, **options
    )


@pytest.fixture(scope="module")
def written(world: World, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after one, two and three steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints, trainer = checkpoints_in(folder, world, model_folder), new_trainer(world, model_folder)
    for number in STEPS:
        step(trainer)
        checkpoints.save(number, trainer, {"cursor": number * 6})
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_the_manifest_says_what_wrote_it_and_sums_every_file(written: Path) -> None:
    manifest = read_manifest(written / "step_000002")
    assert (manifest.step, manifest.progress, manifest.config) == (2, {"cursor": 12}, {"run": {"seed": 7}})
    assert {"megatron-npr", "megatron-core", "torch"} < set(manifest.versions)
    files = {path for path in (written / "step_000002").rglob("*") if path.is_file()}
    assert {written / "step_000002" / name for name in manifest.files} == files - {
        written / "step_000002" / "manifest.json"
    }
    assert {".metadata", "common.pt", "metadata.json", "model/config.json"} < set(manifest.files)


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(
    data: st.DataObject, world: World, written: Path
) -> None:
    folder = written / "step_000003"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    offset = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = 1 << data.draw(st.integers(0, 7))

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ bit]))

    checkpoints = Checkpoints(written, world, keep=3, model_folder=folder, config={})
    flip()
    try:
        with pytest.raises(DamagedCheckpointError, match=path.name):
            checkpoints.verified(folder)
    finally:
        flip()
    checkpoints.verified(folder)


def test_damage_is_named_and_the_checkpoint_before_it_is_resumed(
    copied: Path, world: World, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = copied / "step_000003" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    (copied / "step_000004.writing").mkdir()
    trainer = new_trainer(world, model_folder)
    assert checkpoints_in(copied, world, model_folder).resume(trainer) == (2, {"cursor": 12})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "npr: checkpoint skipped: step_000004.writing: the save was interrupted"
    assert said[1].startswith("npr: checkpoint skipped: step_000003: __0_0.distcp has ") and len(said) == 2


def test_where_nothing_whole_is_left_the_user_is_told_what_to_do(
    copied: Path, world: World, model_folder: Path
) -> None:
    for number in STEPS:
        (copied / f"step_00000{number}" / "common.pt").unlink()
    trainer = new_trainer(world, model_folder)
    with pytest.raises(UserError, match=r"no whole checkpoint is left .*common\.pt is missing.* restore one"):
        checkpoints_in(copied, world, model_folder).resume(trainer)


def test_a_run_that_never_completed_a_checkpoint_begins_anew(
    tmp_path: Path, world: World, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step_000001.writing").mkdir()
    checkpoints, trainer = checkpoints_in(tmp_path, world, model_folder), new_trainer(world, model_folder)
    assert checkpoints.resume(trainer) is None
    assert "step_000001.writing: the save was interrupted" in capsys.readouterr().err
    checkpoints.save(2, trainer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path: Path, world: World, model_folder: Path) -> None:
    checkpoints = checkpoints_in(tmp_path / "none", world, model_folder)
    assert checkpoints.resume(new_trainer(world, model_folder)) is None


@pytest.mark.parametrize("pointer, first", [("step_000002\n", 2), ("step_000009\n", 3), ("", 3), (None, 3)])
def test_latest_decides_where_it_names_a_checkpoint_and_the_newest_elsewhere(
    pointer: str | None, first: int, copied: Path
) -> None:
    (copied / "latest").unlink()
    if pointer is not None:
        (copied / "latest").write_text(pointer)
    assert [path.name for path in candidates(copied)] == [
        f"step_00000{number}" for number in range(first, 0, -1)
    ]


def test_the_last_few_stay_and_those_of_another_history_go_first(
    copied: Path, world: World, model_folder: Path
) -> None:
    checkpoints, trainer = checkpoints_in(copied, world, model_folder), new_trainer(world, model_folder)
    checkpoints.load(copied / "step_000001", trainer)
    checkpoints.save(2, trainer, {})
    checkpoints.save(1, trainer, {})
    assert (copied / "latest").read_text() == "step_000001\n"
    checkpoints.save(4, trainer, {})
    names = sorted(path.name for path in copied.glob("step*"))
    assert names == ["step_000002", "step_000003", "step_000004"]


def test_an_asynchronous_save_holds_the_state_of_its_own_step(
    tmp_path: Path, world: World, model_folder: Path
) -> None:
    trainer = new_trainer(world, model_folder)
    checkpoints = checkpoints_in(tmp_path, world, model_folder, asynchronous=True)
    step(trainer)
    path = checkpoints.save(1, trainer, {})
    assert not path.exists(), "published by finish alone"
    uninterrupted = [step(trainer), step(trainer)]  # changes the weights while the writer may still run
    checkpoints.finish(wait=True)
    resumed = new_trainer(world, model_folder)
    assert checkpoints_in(tmp_path, world, model_folder).resume(resumed) == (1, {})
    assert [step(resumed), step(resumed)] == uninterrupted


@pytest.mark.parametrize("family", ["qwen3 tied", "qwen3_moe"])
def test_sixteen_bit_training_resumes_bit_for_bit_with_its_fp32_weights(
    family: str, tmp_path: Path, world: World
) -> None:
    source = save_family(family, tmp_path / "source")
    trainer = new_trainer(world, source, dtype=torch.bfloat16)
    checkpoints = checkpoints_in(tmp_path / "checkpoints", world, source)
    step(trainer)
    checkpoints.save(1, trainer, {})
    uninterrupted = [step(trainer), step(trainer)]
    resumed = new_trainer(world, source, dtype=torch.bfloat16)
    assert checkpoints.resume(resumed) == (1, {})
    assert [step(resumed), step(resumed)] == uninterrupted
    for one, other in zip(optimizer_tensors(trainer), optimizer_tensors(resumed), strict=True):
        assert torch.equal(one, other)


class Hostile:
    """Unpickled, it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_nothing_that_a_checkpoint_names_is_run(
    name: str, copied: Path, world: World, model_folder: Path, tmp_path: Path
) -> None:
    path, harmed = copied / "step_000003", tmp_path / "harmed"
    hostile = {"state": Hostile(harmed)}
    if name == "common.pt":
        torch.save(hostile, path / name)
    else:
        (path / name).write_bytes(pickle.dumps(hostile))
    # whoever can write the file can write its sum
    checkpoints = checkpoints_in(copied, world, model_folder)
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, files={**manifest.files, name: file_sum(path / name)}))
    with pytest.raises(UserError, match=rf"{name} asks for .*may be hostile"):
        checkpoints.load(path, new_trainer(world, model_folder))
    assert not harmed.exists()


def test_no_object_among_the_tensors_is_run(
    copied: Path, world: World, model_folder: Path, tmp_path: Path
) -> None:
    """Layers have an entry that is no tensor, for Transformer Engine's state; torch unpickles those without a limit."""
    path, harmed = copied / "step_000003", tmp_path / "harmed"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    kinds = metadata.state_dict_metadata
    index = next(i for i in metadata.storage_data if isinstance(kinds[i.fqn], BytesStorageMetadata))
    place = metadata.storage_data[index]
    hostile = io.BytesIO()
    torch.save([Hostile(harmed)], hostile)
    with (path / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), file.write(hostile.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = read_manifest(path)
    sums = {name: file_sum(path / name) for name in manifest.files}
    write_manifest(path, replace(manifest, files=sums))
    with pytest.raises(UserError, match=rf"{index.fqn} asks for more than plain data: it may be hostile"):
        checkpoints_in(copied, world, model_folder).load(path, new_trainer(world, model_folder))
    assert not harmed.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_survives_folder_to_checkpoint_to_folder_bit_for_bit(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_family(family, tmp_path / "source")
    world = init_world()
    run = tmp_path / "run"
    checkpoints = Checkpoints(
        run / "checkpoints", world, keep=1, model_folder=source, config={"model": {"dtype": "fp32"}}
    )
    trainer = new_trainer(world, source)
    path = checkpoints.save(0, trainer, {})
    for number, place in enumerate((run, run / "checkpoints", path)):
        target = tmp_path / f"export{number}"
        assert main(["convert", "--from", str(place), "--to", str(target)]) == 0
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, source))
        assert set(ours) == set(theirs)
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert main(["convert", "--from", str(run), "--to", str(tmp_path / "no"), "--fp8"]) == 2
    assert "--fp8 does not go with a checkpoint" in capsys.readouterr().err
    assert (tmp_path / "export0" / "config.json").read_text() == (source / "config.json").read_text()
    with pytest.raises(UserError, match="exists already"):
        convert_checkpoint(run, tmp_path / "export0")


def test_a_damaged_checkpoint_is_not_exported(copied: Path, tmp_path: Path) -> None:
    (copied / "step_000003" / "common.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint is whole: step_000003: common\.pt has 0 bytes"):
        convert_checkpoint(copied / "step_000003", tmp_path / "export")
