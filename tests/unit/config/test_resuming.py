"""What becomes of a changed setting where a run continues: decided for every key, and said in one line where it is kept."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from megatron_npr.config import Section, Stage1Config, Stage2Config, Stage3Config, load_config
from megatron_npr.config.resuming import BY_SUM, HONOURED, KEPT
from megatron_npr.run_folder.manifest import Manifest, write_manifest
from megatron_npr.run_folder.resumption import INPUTS, check_resumable, input_sums, settings_of
from npr_ext.errors import UserError

TRAINING: list[type[Section]] = [Stage1Config, Stage2Config, Stage3Config]
KEYS = sorted(
    {
        f"{section}.{key}"
        for cls in TRAINING
        for section, table in cls.model_fields.items()
        for key in typing.cast(type[Section], table.annotation).model_fields
    }
)
OTHER = {
    "run.seed": 7,
    "model.dtype": "fp32",
    "fp8.recipe": "blockwise",
    "fp8.format": "e4m3",
    "fp8.first_layers_bf16": 1,
    "fp8.last_layers_bf16": 1,
    "fp8.parameters": True,
    "data.count": 3,
    "data.max_prompt_tokens": 99,
    "data.mode": "sequential",
    "rollout.prompts_per_step": 5,
    "train.global_batch": 5,
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A model folder, data and an instruction."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(3 << 20))
    for name in ("data.jsonl", "instruction.txt"):
        (tmp_path / name).write_text("first\n")
    return tmp_path


def configuration(cls: type[Section], inputs: Path, **changes: Any) -> Section:
    given = {
        "model.path": inputs / "model",
        "data.train": inputs / "data.jsonl",
        "data.instruction": inputs / "instruction.txt",
        "sft.data": inputs / "data.jsonl",
        **changes,
    }
    words = [f"--{name}={value}" for name, value in given.items() if name.split(".")[0] in cls.model_fields]
    return load_config(cls, None, words)


def begun(cls: type[Section], inputs: Path, *, step: int = 14) -> Path:
    """The checkpoints of a run that was interrupted at a step."""
    config = configuration(cls, inputs)
    folder = inputs / "run" / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    progress = {INPUTS: input_sums(settings_of(config))}
    plain = json.loads(config.model_dump_json())
    write_manifest(folder, Manifest(step, {}, plain, progress, {}, {}))
    return folder.parent


def refusal(config: Section, checkpoints: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_resumable(config, checkpoints)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_every_key_of_training_is_in_one_table_and_no_other_is() -> None:
    tables = [*KEPT, *BY_SUM, *HONOURED]
    assert sorted(tables) == sorted([*KEYS, "eval.instruction", "eval.problems"])


@pytest.mark.parametrize("cls", TRAINING)
@pytest.mark.parametrize("name", KEPT)
def test_a_kept_setting_is_refused_and_both_values_are_named(
    cls: type[Section], name: str, inputs: Path
) -> None:
    section, key = name.split(".")
    checkpoints = begun(cls, inputs)
    if section not in cls.model_fields or key not in cls.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
        return
    config = configuration(cls, inputs, **{name: OTHER[name]})
    said = refusal(config, checkpoints)
    assert said.startswith(f"{name} = ") and "(step 14) keeps " in said and KEPT[name] in said
    check_resumable(configuration(cls, inputs), checkpoints)


@pytest.mark.parametrize("cls", TRAINING)
@pytest.mark.parametrize("name", sorted(BY_SUM))
def test_an_input_may_move_but_not_change(cls: type[Section], name: str, inputs: Path) -> None:
    if name.split(".")[0] not in cls.model_fields:
        return
    checkpoints = begun(cls, inputs)
    old = Path(settings_of(configuration(cls, inputs))[name])
    moved = old.rename(old.with_name(f"moved_{old.name}"))
    check_resumable(configuration(cls, inputs, **{name: moved}), checkpoints)
    if moved.is_dir():
        with (moved / "model.safetensors").open("r+b") as file:
            file.seek(-7, 2)
            file.write(b"\1")
    else:
        moved.write_text("another\n")
    said = refusal(configuration(cls, inputs, **{name: moved}), checkpoints)
    assert said.startswith(f'{name} = "{moved}" is not what "{old}" was when the run in ')
    moved.rename(old)
    assert refusal(configuration(cls, inputs), checkpoints).startswith(
        f'{name} = "{old}" is not what it was when'
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_of_another_description_is_another_model(name: str, inputs: Path) -> None:
    checkpoints = begun(Stage3Config, inputs)
    (inputs / "model" / name).write_text('{"changed": 1}')
    assert "model.path" in refusal(configuration(Stage3Config, inputs), checkpoints)


def test_from_a_file_to_generated_problems_is_a_change_and_a_missing_file_is_left_to_its_reader(
    inputs: Path,
) -> None:
    checkpoints = begun(Stage3Config, inputs)
    said = refusal(configuration(Stage3Config, inputs, **{"data.train": "demo"}), checkpoints)
    assert said.startswith('data.train = "demo" is not what')
    said = refusal(configuration(Stage3Config, inputs, **{"data.instruction": "none"}), checkpoints)
    assert said.startswith("data.instruction = none is not what")
    (inputs / "data.jsonl").unlink()
    check_resumable(configuration(Stage3Config, inputs), checkpoints)


def test_a_run_that_had_more_steps_already_is_not_called_done(inputs: Path) -> None:
    checkpoints = begun(Stage3Config, inputs)
    assert re.search(
        r"train\.steps = 13: .*step 14.* at least 14",
        refusal(configuration(Stage3Config, inputs, **{"train.steps": 13}), checkpoints),
    )
    check_resumable(configuration(Stage3Config, inputs, **{"train.steps": 14}), checkpoints)


def test_checkpoints_from_before_sums_were_kept_are_judged_by_their_settings(inputs: Path) -> None:
    checkpoints = begun(Stage3Config, inputs)
    folder = checkpoints / "step_000014"
    plain = json.loads(configuration(Stage3Config, inputs).model_dump_json())
    write_manifest(folder, Manifest(14, {}, plain, {}, {}, {}))
    check_resumable(configuration(Stage3Config, inputs, **{"data.train": "demo"}), checkpoints)
    assert "run.seed" in refusal(configuration(Stage3Config, inputs, **{"run.seed": 1}), checkpoints)
