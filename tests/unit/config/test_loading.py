import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npr.config import (
    EvalConfig,
    SampleConfig,
    Section,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    keys,
    load_config,
    to_toml,
)
from npr_ext.errors import UserError

ALL: list[type[Section]] = [Stage1Config, SampleConfig, Stage2Config, Stage3Config, EvalConfig]
REQUIRED = ["--model.path", "m", "--data.train", "demo"]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def message(cls: type[Section], path: Path | None, overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_config(cls, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_papers_values() -> None:
    zero = load_config(Stage1Config, None, REQUIRED)
    assert (zero.rollout.prompts_per_step, zero.rollout.samples_per_prompt, zero.train.updates_per_step) == (
        32,
        16,
        32,
    )
    assert (zero.dapo.clip_low, zero.dapo.clip_high, zero.dapo.dual_clip, zero.dapo.overlong_buffer) == (
        0.2,
        0.28,
        10,
        10,
    )
    assert (zero.optimizer.lr, zero.optimizer.warmup_steps, zero.optimizer.schedule) == (1e-6, 10, "cosine")
    beta = load_config(Stage2Config, None, ["--model.path", "m", "--sft.data", "s.jsonl"])
    assert (beta.optimizer.min_lr, beta.optimizer.beta2, beta.train.global_batch) == (5e-7, 0.95, 8)
    npr = load_config(Stage3Config, None, REQUIRED)
    assert (npr.rollout.prompts_per_step, npr.optimizer.lr, npr.optimizer.schedule) == (16, 1e-7, "constant")
    assert npr.rollout.branching and not zero.rollout.branching


def test_stage_three_is_on_policy_and_has_no_key_for_more_updates_a_round() -> None:
    given = [*REQUIRED, "--train.updates_per_step", "16"]
    assert load_config(Stage1Config, None, given).train.updates_per_step == 16
    assert "unknown key train.updates_per_step" in message(Stage3Config, None, given)


def test_a_file_that_sets_one_key_of_a_table_keeps_the_stages_other_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\npath = "m"\n[sft]\ndata = "s"\n[optimizer]\nlr = 1e-5\n')
    beta = load_config(Stage2Config, path)
    assert (beta.optimizer.lr, beta.optimizer.min_lr, beta.optimizer.warmup_fraction) == (1e-5, 5e-7, 0.05)


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\npath = "m"\n[data]\ntrain = "demo"\n[train]\nsteps = 7\n')
    config = load_config(Stage3Config, path, ["--train.steps", "4", "--optimizer.lr=2e-4", "--run.resume"])
    assert (config.train.steps, config.optimizer.lr, config.run.resume) == (4, 2e-4, True)


@pytest.mark.parametrize(
    "given, resume",
    [
        (["--run.resume"], True),
        (["--run.resume", "true"], True),
        (["--run.resume", "Auto"], "auto"),
        (["--run.resume=false"], False),
        ([], False),
    ],
)
def test_resume_is_false_true_or_auto(given: list[str], resume: bool | str, tmp_path: Path) -> None:
    assert load_config(Stage3Config, None, [*REQUIRED, *given]).run.resume == resume
    path = write(
        tmp_path, f"[run]\nresume = {str(resume).lower() if isinstance(resume, bool) else repr(resume)}\n"
    )
    config = load_config(Stage3Config, path, REQUIRED)
    assert config.run.resume == resume and type(config.run.resume) is type(resume)
    assert load_config(Stage3Config, write(tmp_path, to_toml(config))) == config


def test_resume_of_another_value_and_beside_overwrite_is_one_line() -> None:
    assert message(Stage3Config, None, [*REQUIRED, "--run.resume", "maybe"]).endswith(
        "run.resume = 'maybe' is none of false, true and auto"
    )
    for resume in ("true", "auto"):
        line = message(Stage3Config, None, [*REQUIRED, "--run.resume", resume, "--run.overwrite"])
        assert (
            f"run.resume = {resume} continues a run, run.overwrite = true starts anew: leave one out" in line
        )


def test_lists_and_none_can_be_given_on_the_command_line() -> None:
    config = load_config(
        EvalConfig,
        None,
        ["--model.path", "m", "--eval.problems", "demo", "--eval.modes", "parallel,unforced"],
    )
    assert config.eval.modes == ("parallel", "unforced")
    assert load_config(SampleConfig, None, [*REQUIRED, "--sample.target", "none"]).sample.target is None


@pytest.mark.parametrize("cls", ALL)
def test_the_resolved_configuration_reads_back_equal(cls: type[Section], tmp_path: Path) -> None:
    required = [part for key in keys(cls) if not key.default for part in (f"--{key.name}", "demo")]
    config = load_config(cls, None, required)
    assert load_config(cls, write(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize("cls", ALL)
def test_every_key_has_a_description(cls: type[Section]) -> None:
    assert all(key.description and key.kind for key in keys(cls))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("optimizer.lrr", "optimizer.lr"), ("train.lr", "optimizer.lr"), ("trian.steps", "train.steps")],
)
def test_an_unknown_key_is_refused_with_a_suggestion(name: str, suggestion: str, tmp_path: Path) -> None:
    assert f"unknown key {name}; did you mean {suggestion}?" in message(
        Stage3Config, None, [*REQUIRED, f"--{name}", "1"]
    )
    section, key = name.split(".")
    path = write(tmp_path, f"[{section}]\n{key} = 1\n")
    assert message(Stage3Config, path, REQUIRED) == f"{path}: unknown key {name}; did you mean {suggestion}?"


def test_a_wrong_value_is_named_with_its_key_and_origin(tmp_path: Path) -> None:
    text = message(Stage3Config, None, [*REQUIRED, "--train.steps", "many"])
    assert text.startswith("command line: train.steps = 'many': ")
    path = write(tmp_path, '[optimizer]\nschedule = "cosin"\n')
    text = message(Stage3Config, path, REQUIRED)
    assert text.startswith(f"{path}: optimizer.schedule = 'cosin': ") and "'cosine'" in text
    assert "greater than or equal to 1" in message(Stage3Config, None, [*REQUIRED, "--parallel.tp", "0"])


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "sequence_parallel needs parallel.tp" in message(
        Stage3Config, None, [*REQUIRED, "--parallel.sequence_parallel", "true"]
    )
    assert "min_lr 1 exceeds" in message(Stage3Config, None, [*REQUIRED, "--optimizer.min_lr", "1"])
    bonus = ["--train.entropy", "false", "--train.entropy_coefficient", "0.01"]
    assert "0.01 needs train.entropy = true" in message(Stage3Config, None, [*REQUIRED, *bonus])


def test_sampling_takes_one_response_a_trial_and_does_not_write_down_another_number() -> None:
    said = message(SampleConfig, None, [*REQUIRED, "--rollout.samples_per_prompt=4"])
    assert (
        said.startswith("rollout.samples_per_prompt 4: npr sample takes one response")
        and "sample.trials" in said
    )


def test_the_home_is_known_in_files_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path, '[run]\ndir = "~/runs/a"\n[model]\npath = "~x/m"\n')
    config = load_config(Stage3Config, path, ["--data.train=~/problems.jsonl"])
    assert config.run.dir == tmp_path / "home/runs/a" and config.data.train == str(
        tmp_path / "home/problems.jsonl"
    )
    assert config.model.path == Path("~x/m"), "a name like any other"


@pytest.mark.parametrize("key", ["run.dir", "data.train", "model.path", "log.backend"])
def test_an_empty_value_is_refused(key: str) -> None:
    line = message(Stage3Config, None, [*REQUIRED, f"--{key}="])
    assert line == f"command line: {key} = '': it is empty: give a value, or leave the key out"


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer.lr", "1e39"), ("rollout.temperature", "1e300"), ("run.threads", "1025")]
)
def test_what_the_arithmetic_or_the_machine_cannot_hold_is_refused(key: str, value: str) -> None:
    assert f"{key} = '{value}': input should be less than or equal to " in message(
        Stage3Config, None, [*REQUIRED, f"--{key}", value]
    )


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("samples_per_prompt", "4", "eval.samples_per_problem"),
        ("branching", "false", "eval.modes"),
    ],
)
def test_what_an_evaluation_takes_from_another_key_is_refused_and_not_listed(
    key: str, value: str, instead: str, tmp_path: Path
) -> None:
    given = ["--model.path", "m", "--eval.problems", "demo"]
    line = f"rollout.{key} is not of this command: set {instead}"
    assert message(EvalConfig, None, [*given, f"--rollout.{key}", value]) == f"--rollout.{key}: {line}"
    path = write(tmp_path, f"[rollout]\n{key} = {value}\n")
    assert message(EvalConfig, path, given) == f"{path}: {line}"
    names = {listed.name for listed in keys(EvalConfig)}
    assert f"rollout.{key}" not in names and instead in names
    assert f"{key} =" not in to_toml(load_config(EvalConfig, None, given))


@pytest.mark.parametrize("cls", [Stage1Config, Stage3Config])
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("samples_per_prompt=1", "samples_per_prompt 1: a group of one"),
        ("temperature=0", "temperature 0: a group of equal responses"),
        ("top_k=1", "top_k 1: a group of equal responses"),
    ],
)
def test_rl_from_groups_that_cannot_differ_is_refused_and_other_commands_may_have_them(
    cls: type[Section], setting: str, named: str
) -> None:
    assert message(cls, None, [*REQUIRED, f"--rollout.{setting}"]).startswith(f"rollout.{named}")
    load_config(SampleConfig, None, [*REQUIRED, f"--rollout.{setting}"])
    if "samples" not in setting:
        load_config(
            EvalConfig, None, ["--model.path", "m", "--eval.problems", "demo", f"--rollout.{setting}"]
        )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            ["--rollout.kv_slots=2", "--rollout.max_tokens=2"],
            "rollout.block_size 4 exceeds rollout.kv_slots 2",
        ),
        (["--rollout.prompts_per_step=999999999999"], "rollout.prompts_per_step 999999999999 times"),
        (["--rollout.samples_per_prompt=999999999999"], "are more than 4,194,304 responses a round: lower"),
        (["--rollout.max_batch_tokens=8"], "rollout.max_batch_tokens 8 must exceed rollout.max_branches 8"),
        (["--rollout.max_tokens=600000"], "rollout.max_tokens 600000 exceeds rollout.kv_slots 524288"),
        (["--optimizer.beta1=1"], "optimizer.beta1 = '1': input should be less than 1"),
        (["--run.seed=9223372036854775808"], "run.seed = '9223372036854775808': input should be less than"),
    ],
)
def test_sizes_that_no_engine_or_optimizer_takes_are_refused_with_this_files_keys(
    settings: list[str], named: str
) -> None:
    assert named in message(Stage3Config, None, [*REQUIRED, *settings])


@pytest.mark.parametrize("name", ["data.train", "train.steps", "optimizer.lr", "data.instruction"])
def test_an_option_without_a_value_is_refused_unless_it_is_a_switch(name: str) -> None:
    assert message(Stage3Config, None, [*REQUIRED, f"--{name}"]).startswith(f"--{name} needs a value")
    assert message(Stage3Config, None, [f"--{name}", *REQUIRED]).startswith(f"--{name} needs a value")
    assert load_config(Stage3Config, None, [*REQUIRED, "--memory.release_kv"]).memory.release_kv


def test_a_file_is_utf8_whatever_the_locale_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes('\ufeff[model]\r\npath = "modèle"\r\n'.encode())
    assert str(load_config(Stage3Config, path, ["--data.train", "demo"]).model.path) == "modèle"
    path.write_bytes('[model]\npath = "modèle"\n'.encode("latin-1"))
    assert message(Stage3Config, path, []) == f"{path} is not UTF-8 text: expected TOML"


def test_a_missing_required_key_says_how_to_set_it() -> None:
    assert message(Stage3Config, None, ["--data.train", "demo"]) == (
        "model.path is not set: put it into the configuration file or give --model.path VALUE"
    )


def test_bad_files_are_one_line_errors(tmp_path: Path) -> None:
    assert "no such configuration file" in message(Stage3Config, tmp_path / "absent.toml", [])
    assert "is a folder" in message(Stage3Config, tmp_path, [])
    assert "not valid TOML" in message(Stage3Config, write(tmp_path, "[train\n"), [])
    assert "outside a table" in message(Stage3Config, write(tmp_path, "steps = 3\n"), [])
    assert "unknown key trian" in message(Stage3Config, write(tmp_path, "[trian]\n"), [])


def test_a_stray_argument_is_refused() -> None:
    assert "unexpected argument 'steps=4'" in message(Stage3Config, None, ["steps=4"])


def test_the_schema_imports_no_torch() -> None:
    code = "import sys, megatron_npr.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
