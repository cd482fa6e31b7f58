"""What a second start in a folder does: every way to say so, whatever the folder holds, and whenever the process dies."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_npr.config import (
    EvalConfig,
    SampleConfig,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    StageConfig,
    load_config,
)
from megatron_npr.run_folder.claim import LOCK, claim, find_run, withdraw
from npr_ext.errors import UserError

REQUIRED = {
    Stage1Config: ["--model.path", "m", "--data.train", "demo"],
    SampleConfig: ["--model.path", "m", "--data.train", "demo"],
    Stage2Config: ["--model.path", "m", "--sft.data", "s.jsonl"],
    Stage3Config: ["--model.path", "m", "--data.train", "demo"],
    EvalConfig: ["--model.path", "m", "--eval.problems", "demo"],
}
COMMANDS = pytest.mark.parametrize("cls", REQUIRED, ids=lambda cls: cls.command)


def config(cls: type[StageConfig], folder: Path, *overrides: str) -> StageConfig:
    return load_config(cls, None, ["--run.dir", str(folder), *REQUIRED[cls], *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which says nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refusal(settings: StageConfig) -> str:
    """The line; nothing in or beside the folder has changed."""
    parent = settings.run.dir.parent
    before = contents(parent)
    with pytest.raises(UserError) as caught:
        claim(settings)
    assert contents(parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def work(folder: Path, cls: type[StageConfig], done: int) -> None:
    """What a run leaves behind `done` steps, rounds or modes."""
    if cls in (SampleConfig, EvalConfig):
        (folder / "progress.jsonl").write_text(
            "".join(f'{{"number": {i}}}\n' for i in range(done)) + '{"cut of'
        )
    else:
        for step in range(1, done + 1):
            (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
            (folder / "checkpoints" / f"step_{step:06d}" / "weights").write_text(f"{step}")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(done + 2)))


def elsewhere(work: Callable[[], object]) -> int:
    """Exit code of a process that does `work` and ends: 1 after an error, which it prints."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def started(cls: type[StageConfig], folder: Path, *words: str, done: int = 0) -> Path:
    """A folder in which a process, which is gone, has started a run."""
    assert elsewhere(lambda: claim(config(cls, folder, *words))) == 0
    if done:
        work(folder, cls, done)
    return folder


@COMMANDS
def test_a_second_start_is_refused_with_the_step_and_both_remedies(
    cls: type[StageConfig], tmp_path: Path
) -> None:
    folder = started(cls, tmp_path / "run", done=3)
    line = refusal(config(cls, folder))
    unit = "round" if cls.command in ("sample", "eval") else "step"
    assert f"{folder} holds a run of {cls.command} ({unit} 3)" in line
    assert "--run.resume true" in line and "--run.overwrite true" in line and f"{folder}.1" in line


@COMMANDS
@pytest.mark.parametrize("resume", ["true", "auto"])
def test_a_run_is_continued_when_asked_to(cls: type[StageConfig], resume: str, tmp_path: Path) -> None:
    folder = started(cls, tmp_path / "run", done=3)
    before = contents(folder)
    assert claim(config(cls, folder, "--run.resume", resume))
    after = contents(folder)
    assert {name: after[name] for name in before if name not in ("run.json", "config.toml")} == {
        name: before[name] for name in before if name not in ("run.json", "config.toml")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@COMMANDS
def test_overwriting_moves_the_old_run_aside_whole(
    cls: type[StageConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = started(cls, tmp_path / "run", done=3)
    (folder / "notes.txt").write_text("the user's own")
    first = contents(folder)
    assert not claim(config(cls, folder, "--run.overwrite", "true"))
    assert contents(tmp_path / "run.1") == first
    assert capsys.readouterr().err == f"npr: {folder}: the run that stood here is now in {folder}.1\n"
    work(folder, cls, 1)
    second = contents(folder)
    assert not claim(config(cls, folder, "--run.overwrite", "true"))
    assert (contents(tmp_path / "run.1"), contents(tmp_path / "run.2")) == (first, second)


@COMMANDS
def test_resuming_where_nothing_is_says_so(cls: type[StageConfig], tmp_path: Path) -> None:
    assert "there is no run to resume" in refusal(config(cls, tmp_path / "absent", "--run.resume"))
    assert not (tmp_path / "absent").exists()
    (tmp_path / "empty").mkdir()
    assert "there is no run to resume" in refusal(config(cls, tmp_path / "empty", "--run.resume"))
    assert not claim(config(cls, tmp_path / "absent", "--run.resume", "auto"))


@COMMANDS
def test_a_run_without_a_checkpoint_counts_as_a_run(cls: type[StageConfig], tmp_path: Path) -> None:
    folder = started(cls, tmp_path / "run")
    assert "no step yet" in refusal(config(cls, folder))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert "step 2, without a checkpoint" in refusal(config(cls, folder))
    assert "nothing to resume from" in refusal(config(cls, folder, "--run.resume"))
    before = contents(folder)
    assert not claim(config(cls, folder, "--run.resume", "auto"))  # begins again, and keeps what was there
    assert contents(tmp_path / "run.1") == before


@pytest.mark.parametrize(
    "name",
    [
        "config.toml",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "samples.jsonl",
        "eval.json",
        "rollouts.jsonl",
        "wandb",
        "tensorboard",
    ],
)
def test_what_a_version_without_marks_left_counts_as_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).mkdir() if "." not in name else (tmp_path / "run" / name).write_text("")
    assert "holds a run" in refusal(config(Stage3Config, tmp_path / "run"))


def test_a_run_without_a_mark_is_continued_by_its_own_command_alone(tmp_path: Path) -> None:
    folder = started(Stage1Config, tmp_path / "run", done=2)
    (folder / "run.json").unlink()
    assert "a run of stage1" in refusal(config(Stage3Config, folder, "--run.resume"))
    assert claim(config(Stage1Config, folder, "--run.resume"))


def test_files_of_the_users_own_are_no_run_and_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert not claim(config(Stage3Config, tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_another_commands_run_is_not_continued(resume: str, tmp_path: Path) -> None:
    folder = started(Stage1Config, tmp_path / "run", done=2)
    line = refusal(config(Stage3Config, folder, "--run.resume", resume))
    assert "holds a run of stage1 (step 2), not of stage3" in line


@pytest.mark.parametrize("version", [2, 99, -1, "1", True, 1.0])
def test_a_run_of_another_format_is_refused_in_a_line_that_names_it(version: object, tmp_path: Path) -> None:
    folder = started(Stage3Config, tmp_path / "run", done=2)
    mark = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(mark | {"format_version": version}))
    line = refusal(config(Stage3Config, folder, "--run.resume"))
    assert f"{folder} is a run folder of format version {version!r}" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', "\0"])
def test_a_damaged_mark_loses_no_run(text: str, tmp_path: Path) -> None:
    folder = started(Stage3Config, tmp_path / "run", done=2)
    (folder / "run.json").write_text(text)
    assert "(step 2)" in refusal(config(Stage3Config, folder))
    assert claim(config(Stage3Config, folder, "--run.resume"))


@pytest.mark.parametrize("given", ["model.path", "data.train", "data.instruction"])
def test_a_run_that_the_new_one_reads_from_is_not_moved(given: str, tmp_path: Path) -> None:
    folder = started(Stage3Config, tmp_path / "run", done=2)
    (folder / "model").mkdir()
    (tmp_path / "link").symlink_to(folder)
    line = refusal(
        config(Stage3Config, folder, f"--{given}", str(tmp_path / "link" / "model"), "--run.overwrite")
    )
    assert f"{given} = {tmp_path / 'link' / 'model'} lies in it" in line


def test_the_current_folder_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = started(Stage3Config, tmp_path / "run", done=2)
    (folder / "below").mkdir()
    for place, name in ((folder, "."), (folder / "below", "..")):
        monkeypatch.chdir(place)
        with pytest.raises(UserError, match="is the current folder"):
            claim(config(Stage3Config, Path(name), "--run.overwrite"))
    assert folder.is_dir()


def test_behind_a_link_the_folder_moves_and_the_link_stays(tmp_path: Path) -> None:
    started(Stage3Config, tmp_path / "scratch", done=2)
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    assert not claim(config(Stage3Config, tmp_path / "run", "--run.overwrite"))
    assert (tmp_path / "run").is_symlink() and (tmp_path / "scratch" / "run.json").is_file()
    assert find_run(tmp_path / "scratch.1") is not None


@COMMANDS
@pytest.mark.parametrize("how", ["", "--run.resume=true", "--run.resume=auto", "--run.overwrite=true"])
def test_a_folder_in_use_is_left_alone(cls: type[StageConfig], how: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not claim(config(cls, folder))  # this process holds it
    work(folder, cls, 2)
    expected = "holds a run" if not how else f"is in use: process {os.getpid()} on "

    def start() -> None:
        assert expected in refusal(config(cls, folder, *how.split()))

    assert elsewhere(start) == 0


def test_a_start_that_failed_before_it_did_anything_leaves_nothing(tmp_path: Path) -> None:
    claim(config(Stage3Config, tmp_path / "run"))
    withdraw(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = started(Stage3Config, tmp_path / "other")
    withdraw(other)  # not ours
    assert (other / "run.json").is_file()
    claim(config(Stage3Config, tmp_path / "run"))
    work(tmp_path / "run", Stage3Config, 1)
    withdraw(tmp_path / "run")
    assert find_run(tmp_path / "run") is not None


@pytest.mark.parametrize(
    "cls, out",
    [
        (SampleConfig, "metrics.jsonl"),
        (EvalConfig, "config.toml"),
        (EvalConfig, "checkpoints/x"),
        (EvalConfig, "rollouts.jsonl"),
        (SampleConfig, "/tmp/x"),
        (SampleConfig, "../x"),
        (EvalConfig, "run.json"),
        (EvalConfig, "."),
    ],
)
def test_an_output_has_a_name_of_its_own_in_the_run_folder(
    cls: type[StageConfig], out: str, tmp_path: Path
) -> None:
    table = cls.command
    assert f"{table}.out = {out}" in refusal(config(cls, tmp_path / "run", f"--{table}.out", out))


def test_an_output_that_the_user_has_named_counts_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text("")
    assert "holds a run" in refusal(config(SampleConfig, tmp_path, "--sample.out", "kept.jsonl"))


@pytest.mark.parametrize(
    "cls, changed, value",
    [
        (SampleConfig, "run.seed", "1"),
        (SampleConfig, "model.path", "other"),
        (SampleConfig, "data.train", "other.jsonl"),
        (SampleConfig, "rollout.temperature", "0.5"),
        (SampleConfig, "rollout.max_tokens", "17"),
        (EvalConfig, "eval.problems", "other.jsonl"),
        (EvalConfig, "eval.samples_per_problem", "3"),
        (EvalConfig, "rollout.top_p", "0.3"),
        (EvalConfig, "run.seed", "9"),
    ],
)
def test_samples_of_two_configurations_do_not_mix(
    cls: type[StageConfig], changed: str, value: str, tmp_path: Path
) -> None:
    folder = started(cls, tmp_path / "run", done=1)
    assert f"{changed} = " in refusal(config(cls, folder, "--run.resume", f"--{changed}", value))


@pytest.mark.parametrize(
    "cls, changed",
    [(SampleConfig, "data.train"), (SampleConfig, "data.instruction"), (EvalConfig, "eval.problems")],
)
def test_problems_that_have_changed_since_are_not_gone_on_with_and_those_that_moved_are(
    cls: type[StageConfig], changed: str, tmp_path: Path
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("first\n")
    folder = started(cls, tmp_path / "run", f"--{changed}", str(old), done=1)
    moved = old.rename(tmp_path / "moved.jsonl")
    assert claim(config(cls, folder, "--run.resume", f"--{changed}", str(moved)))
    moved.write_text("first\nsecond\n")
    said = refusal(config(cls, folder, "--run.resume", f"--{changed}", str(moved)))
    assert said.startswith(f'{changed} = "{moved}" is not what it was when ')


@pytest.mark.parametrize(
    "cls, changed",
    [
        (
            SampleConfig,
            ["--sample.trials", "3", "--sample.target", "7", "--run.threads", "1", "--parallel.tp", "2"],
        ),
        (
            EvalConfig,
            ["--eval.modes", "parallel,unforced", "--log.progress", "false", "--rollout.kv_slots", "77777"],
        ),
    ],
)
def test_what_no_sample_depends_on_may_change(
    cls: type[StageConfig], changed: list[str], tmp_path: Path
) -> None:
    assert claim(config(cls, started(cls, tmp_path / "run", done=1), "--run.resume", *changed))


def test_a_requeued_job_continues_its_own_run_and_still_moves_another_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command line, `--run.overwrite true` in it, runs again after a node's failure."""
    folder = started(Stage3Config, tmp_path / "run", done=2)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert not claim(config(Stage3Config, folder, "--run.overwrite"))
    work(folder, Stage3Config, 4)
    assert not claim(config(Stage3Config, folder, "--run.overwrite"))  # by hand, within the same allocation
    work(folder, Stage3Config, 5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claim(config(Stage3Config, folder, "--run.overwrite"))
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert not claim(config(Stage3Config, folder, "--run.overwrite"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2", "run.3"]


def dying(moment: int, folder: Path) -> None:
    """End this process at the moment-th change that it makes to the disk in or beside the folder."""
    left = moment

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        opened = event == "open" and bool(int(str(arguments[2])) & (os.O_CREAT | os.O_WRONLY))
        if (opened or event in ("os.rename", "os.mkdir")) and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os._exit(9)

    sys.addaudithook(hook)
    claim(config(Stage3Config, folder, "--run.overwrite"))


def test_a_process_that_dies_at_any_moment_of_a_start_loses_nothing(tmp_path: Path) -> None:
    original = started(Stage3Config, tmp_path / "original", done=2)
    before, code, moment = contents(original), 9, 0
    while code == 9:
        folder = tmp_path / str(moment) / "run"
        shutil.copytree(original, folder)
        code = elsewhere(partial(dying, moment, folder))
        kept = [path for path in folder.parent.iterdir() if contents(path) == before]
        assert len(kept) == 1, f"moment {moment}"
        assert not claim(config(Stage3Config, folder, "--run.overwrite")), "and the next start works"
        assert before in [contents(path) for path in folder.parent.iterdir()]
        moment += 1
    assert code == 0 and moment > 6
