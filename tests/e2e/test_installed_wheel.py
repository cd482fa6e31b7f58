"""The wheel, installed elsewhere: nothing that a command reads may lie in the checkout alone."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.places import ROOT

pytestmark = [pytest.mark.slow]

LOAD_ALL = """
import json
from pathlib import Path
import megatron_npr, npr_engine, npr_ext, npr_ext.library
from megatron_npr.config import CONFIGS, EvalConfig, SampleConfig, Stage1Config, Stage2Config, Stage3Config, load_config
from megatron_npr.demo.run import Demo, run_folder

stages = dict(eval=EvalConfig, sample=SampleConfig, stage1=Stage1Config, stage2=Stage2Config, stage3=Stage3Config)
for path in CONFIGS.rglob("*.toml"):
    load_config(stages.get(path.stem, Stage3Config), path)
demo = Demo(run_folder(Path("demo"), 0, False))
configurations = [demo.zero, demo.samples, demo.beta, demo.npr, demo.sequential_rl]
print(json.dumps([module.__file__ for module in (megatron_npr, npr_engine, npr_ext)] + [str(CONFIGS)]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv that has the wheel, and what it needs from the packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run([*pip, *build], check=True)  # compiles only what is newer than build/
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "needs.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [
        "--python",
        str(python),
        "install",
        "--no-index",
        "--no-deps",
        "--ignore-installed",
        str(wheel),
    ]
    subprocess.run([*pip, *install], check=True)
    return folder


def run(installed: Path, *words: str, exit_code: int = 0) -> str:
    """What a program of the venv prints, in a folder far from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "venv/bin" / words[0]), *words[1:]]
    done = subprocess.run(
        command, cwd=installed, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == exit_code, done.stderr
    return done.stdout if exit_code == 0 else done.stderr


def test_packages_configurations_and_the_demos_files_come_from_the_wheel(installed: Path) -> None:
    for place in json.loads(run(installed, "python", "-c", LOAD_ALL)):
        assert Path(place).is_relative_to(installed / "venv")


def test_commands_help_plan_and_refuse_in_one_line(installed: Path) -> None:
    assert "stage1" in run(installed, "npr", "--help")
    assert "--rollout.max_tokens" in run(installed, "npr", "stage1", "--help")
    (configs,) = (installed / "venv/lib").glob("python*/site-packages/megatron_npr/configs")
    planned = run(
        installed, "npr", "plan", "--config", str(configs / "32b-4node/stage3.toml"), "--nodes", "4"
    )
    assert "memory" in planned
    said = run(installed, "npr", "stage1", "configs/stage1.toml", exit_code=2)
    assert said.endswith(f"those that come with npr lie in {configs}\n")


def test_the_engine_decodes_with_the_base_model_of_the_wheel(installed: Path) -> None:
    (package,) = (installed / "venv/lib").glob("python*/site-packages/megatron_npr")
    small = ["--eval.count", "4", "--eval.samples_per_problem", "1", "--rollout.prompts_per_step", "4"]
    model = ["--model.path", str(package / "assets/demo_base"), "--run.dir", "run"]
    run(installed, "npr", "eval", str(package / "configs/demo/eval.toml"), *model, *small)
    assert list((installed / "run").rglob("*.json"))
