"""Sizes that cannot hold the longest prompt and response are found before the first step, in the command's keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_npr import config as schema
from megatron_npr.cli import main
from megatron_npr.cli.commands import STAGES
from megatron_npr.config import Stage3Config, keys, load_config
from megatron_npr.data.samples import SftSample, write_samples
from megatron_npr.demo.base import FOLDER
from megatron_npr.runtime.process_world import close_world
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.room import check_rollout_room
from megatron_npr.training.session import Session, open_session
from npr_ext.errors import UserError

ROLLOUTS = ("stage1", "stage3", "sample", "eval")
PROMPT = r"the longest prompt \(\d+ tokens\) and rollout\.max_tokens 320"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    write_samples(path, [SftSample(str(size), [3] * size, [50, 51, 1], "text") for size in (5, 90, 7)])
    return path


def words_of(command: str, run: Path, samples: Path, **settings: object) -> list[str]:
    given = {
        "run.dir": run,
        "model.path": FOLDER,
        "model.dtype": "fp32",
        "run.threads": 1,
        "log.backend": "none",
    }
    own = {
        "stage1": {"data.train": "demo", "data.count": 40, "rollout.max_tokens": 320},
        "stage2": {"sft.data": samples},
        "eval": {"eval.problems": "demo", "eval.count": 40, "rollout.max_tokens": 320},
    }
    own["stage3"] = own["sample"] = own["stage1"]
    return [command, *(f"--{name}={value}" for name, value in (given | own[command] | settings).items())]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    close_world()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("npr: error: ") and said.count("\n") == 1
    named = set(re.findall(r"\b[a-z0-9]+\.[a-z][a-z_]+\b", said.replace(str(FOLDER), "")))
    known = {key.name for key in keys(getattr(schema, STAGES[words[0]].config))}
    assert {name for name in named if name.split(".")[1] not in ("jsonl", "txt", "json")} <= known
    return said.removeprefix("npr: error: ").strip()


@pytest.mark.parametrize("command", ROLLOUTS)
def test_a_kv_cache_below_the_longest_response_is_refused_at_the_start(
    command: str, tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    said = refusal(words_of(command, run, samples, **{"rollout.kv_slots": 330}), capsys)
    table = "eval" if command == "eval" else "data"
    assert re.fullmatch(
        rf"{PROMPT} need \d+ KV slots: raise rollout\.kv_slots from 330, or lower rollout\.max_tokens or "
        rf"{table}\.max_prompt_tokens",
        said,
    )
    assert not run.exists(), "nothing began"


@pytest.mark.parametrize("command", ["stage1", "stage3"])
def test_a_row_below_the_longest_response_is_refused_at_the_start(
    command: str, tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(words_of(command, tmp_path / "run", samples, **{"batch.micro_batch_tokens": 330}), capsys)
    assert re.match(
        rf"{PROMPT} make \d+ tokens of a row: raise batch\.micro_batch_tokens from 330, or lower ", said
    )
    assert not (tmp_path / "run").exists()


def test_a_row_below_the_longest_sample_is_refused_at_the_start(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(words_of("stage2", tmp_path / "run", samples, **{"batch.micro_batch_tokens": 92}), capsys)
    assert said == (
        f"the longest sample of {samples} (93 tokens) does not fit a row: raise batch.micro_batch_tokens from 92, or leave it "
        "out"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ROLLOUTS)
def test_what_is_wrong_with_prompts_and_instructions_is_said_in_the_commands_own_keys(
    command: str, tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "eval" if command == "eval" else "data"
    (tmp_path / "empty.txt").write_text("")
    for key, value, text in (
        ("max_prompt_tokens", 3, f"prompts are longer than {table}.max_prompt_tokens = 3 "),
        ("instruction", tmp_path / "none.txt", f"leave {table}.instruction out"),
        ("instruction", tmp_path / "empty.txt", f"is empty: leave {table}.instruction out"),
    ):
        assert text in refusal(
            words_of(command, tmp_path / "run", samples, **{f"{table}.{key}": value}), capsys
        )


@pytest.fixture
def session(tmp_path: Path, samples: Path) -> Session:
    config = load_config(Stage3Config, None, words_of("stage3", tmp_path / "run", samples)[1:])
    close_world()
    return open_session(config)


def test_sizes_that_just_hold_the_longest_response_are_taken_and_one_less_is_not(session: Session) -> None:
    config = session.config
    assert isinstance(config, Stage3Config)
    prompts = training_prompts(session, config.data)
    total = max(len(prompt.prompt_ids) for prompt in prompts) + config.rollout.max_tokens
    for slots, row, fits in ((total, total, True), (total - 1, total, False), (total, total - 1, False)):
        rollout = config.rollout.model_copy(update={"kv_slots": slots, "block_size": 1})
        batch = config.batch.model_copy(update={"micro_batch_tokens": row})
        if fits:
            check_rollout_room(session, prompts, config.data, rollout, batch)
        else:
            with pytest.raises(UserError, match="the longest prompt"):
                check_rollout_room(session, prompts, config.data, rollout, batch)


def test_a_response_that_may_leave_the_models_context_is_warned_of_once(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    config = session.config
    assert isinstance(config, Stage3Config)
    prompts = training_prompts(session, config.data)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    capsys.readouterr()
    for max_tokens, warnings in ((2048 - longest, 0), (2049 - longest, 1)):
        rollout = config.rollout.model_copy(update={"max_tokens": max_tokens})
        check_rollout_room(session, prompts, config.data, rollout)
        said = capsys.readouterr().err
        assert said.count("npr: warning: ") == said.count("\n") == warnings
    assert (
        f"rollout.max_tokens {2049 - longest} may reach position 2049, the model's context ends at 2048"
        in said
    )
