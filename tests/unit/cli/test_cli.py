import importlib.util
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_npr import config as schema
from megatron_npr.cli import main
from megatron_npr.cli.commands import STAGES, TOOLS
from megatron_npr.config import CONFIGS


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("npr: error: ")
    return printed.err.removeprefix("npr: error: ").strip()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in [*STAGES, *TOOLS])


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: npr COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("command", STAGES)
def test_help_of_a_stage_lists_its_settings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--run.seed" in text
    assert "(required)" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_help_comes_without_torch_and_at_once() -> None:
    code = "import sys, megatron_npr.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of work, not of waiting for a disk or for other processes.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 1.0


def test_every_tool_has_its_module_whose_options_and_help_come_without_torch() -> None:
    """In a process of its own, all in one: each module of the table is there and offers its two functions."""
    code = """
import sys
from megatron_npr.cli import main
from megatron_npr.cli.commands import TOOLS
for name, tool in TOOLS.items():
    module = tool.load()
    assert callable(module.add_arguments) and callable(module.run), name
    try:
        main([name, '--help'])
    except SystemExit as end:
        assert end.code == 0, name
assert 'torch' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("usage: npr ")] == [
        *TOOLS
    ]


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_has_its_module_and_its_configuration(command: str) -> None:
    stage = STAGES[command]
    assert importlib.util.find_spec(f"megatron_npr.stages.{stage.module}") is not None
    assert issubclass(getattr(schema, stage.config), schema.StageConfig)


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(["stge3"], capsys) == "unknown command 'stge3'; did you mean stage3?"


def test_a_missing_configuration_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(["stage3", "absent.toml"], capsys)
    assert said == f"absent.toml: no such configuration file; those that come with npr lie in {CONFIGS}"
    assert (CONFIGS / "stage3.toml").is_file()


def test_an_unknown_key_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stage3", "--model.path", "m", "--data.train", "demo", "--train.stps", "4"]
    assert "unknown key train.stps; did you mean train.steps?" in failure(words, capsys)


def test_a_run_folder_under_a_file_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = [
        "stage3",
        "--model.path",
        "m",
        "--data.train",
        "demo",
        "--run.dir",
        str(tmp_path / "file" / "run"),
    ]
    assert "is not a folder" in failure(words, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", [["demo", "--seed", "x"], ["demo", "--sed", "1"], ["trace"]])
def test_a_mistake_in_the_options_of_a_tool_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure(words, capsys).endswith(f"see npr {words[0]} --help")


def test_only_rank_0_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["stge3"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "start, again",
    [
        ([], []),
        (["--run.resume"], []),
        (["--run.resume", "true"], []),
        (["--run.resume=auto", "--run.seed", "3"], ["--run.seed", "3"]),
        (["--run.overwrite", "--run.seed", "3"], ["--run.seed", "3"]),
        (["--run.overwrite", "true", "--run.seed=3"], ["--run.seed=3"]),
    ],
)
@pytest.mark.parametrize("command", ["stage3", "sample"])
def test_an_interrupt_exits_130_and_says_how_to_continue(
    command: str,
    start: list[str],
    again: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(
        sys.modules, f"megatron_npr.stages.{STAGES[command].module}", types.SimpleNamespace(run=run)
    )
    words = [command, "--model.path", "m", "--data.train", "demo", "--run.dir", str(tmp_path)]
    assert main([*words, *start]) == 130
    said = f"npr: interrupted; continue with: npr {' '.join([*words, *again])} --run.resume auto\n"
    assert capsys.readouterr().err == said


def test_the_shipped_base_model_is_not_made_again_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before any work; so is any other model that stands where --out says."""
    assert "assets/demo_base exists already" in failure(["base"], capsys)
    (tmp_path / "config.json").write_text("{}")
    assert "--force to replace it" in failure(["base", "--out", str(tmp_path)], capsys)


@pytest.mark.parametrize("words", [["trace", "rollouts.jsonl"], ["draw", "layout"]])
def test_a_file_of_another_kind_is_not_replaced(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is read; a file of its own kind is replaced."""
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    line = failure([*words, "--out", str(notes)], capsys)
    assert line.startswith(f"{notes} holds something else than a ") and line.endswith("give another --out")
    assert notes.read_text() == "my notes"


def test_a_picture_is_drawn_over_the_last_one_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["draw", "layout"]) == 0
    drawn = (tmp_path / "layout.svg").read_text()
    (tmp_path / "layout.svg").write_text(drawn[:100])
    assert main(["draw", "layout"]) == 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("layout.svg", drawn)]
