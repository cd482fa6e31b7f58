import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
ECHO = '#!/usr/bin/env bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"\n'


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NPR_", "RANK"))
    }
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_executable_and_parses(script: str) -> None:
    path = ROOT / "launch" / script
    assert os.access(path, os.X_OK)
    assert run(["bash", "-n", str(path)]).returncode == 0


def test_without_slurm_a_stage_runs_here(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", '#!/usr/bin/env bash\necho "$*"\n')
    done = run([str(ROOT / "launch/stage3.sh"), "x.toml", "--train.steps", "4"], NPR_PYTHON=str(python))
    assert done.stdout == "-m megatron_npr stage3 x.toml --train.steps 4 --run.resume auto\n"


@pytest.mark.parametrize(
    "words, told",
    [
        ("stage3 x.toml", True),
        ("sample x.toml", True),
        ("eval x.toml", True),
        ("stage1 x.toml --run.resume", False),
        ("stage1 x.toml --run.resume=false", False),
        ("stage2 x.toml --run.overwrite true", False),
        ("convert --from a --to b", False),
        ("--help", False),
    ],
)
def test_a_stage_is_told_to_continue_unless_the_command_line_says_otherwise(
    words: str, told: bool, tmp_path: Path
) -> None:
    python = executable(tmp_path / "python", '#!/usr/bin/env bash\necho "$*"\n')
    done = run([str(ROOT / "launch/local.sh"), *words.split()], NPR_PYTHON=str(python))
    assert done.stdout == f"-m megatron_npr {words}" + " --run.resume auto" * told + "\n"


def test_several_processes_come_from_torchrun(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", '#!/usr/bin/env bash\necho "$*"\n')
    done = run([str(ROOT / "launch/stage1.sh"), "x.toml"], NPR_PYTHON=str(python), NPROC="2")
    assert done.stdout == (
        "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1"
        f" --nproc-per-node 2 --no-python {python} -m megatron_npr stage1 x.toml --run.resume auto\n"
    )


def test_the_profiler_stands_before_every_process(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", '#!/usr/bin/env bash\necho "$*"\n')
    nsys = executable(tmp_path / "nsys", '#!/usr/bin/env bash\necho "nsys $*"\n')
    given = {"NPR_PYTHON": str(python), "NPR_NSYS": str(nsys), "NPR_PROFILE_DIR": str(tmp_path / "out")}
    alone = run([str(ROOT / "launch/profile.sh"), "stage3", "x.toml"], **given).stdout
    assert alone.startswith("nsys profile --trace=cuda,nvtx")
    assert alone.endswith(f"--output={tmp_path}/out/%h-%p {python} -m megatron_npr stage3 x.toml\n")
    several = run([str(ROOT / "launch/profile.sh"), "stage3", "x.toml"], NPROC="2", **given).stdout
    assert f"--no-python {nsys} profile" in several
    assert several.endswith(f"{python} -m megatron_npr stage3 x.toml\n")


def test_a_missing_profiler_is_one_clear_line() -> None:
    done = run([str(ROOT / "launch/profile.sh"), "stage3"], NPR_NSYS="no-such-nsys")
    assert done.returncode == 2
    assert done.stderr == "no no-such-nsys: install Nsight Systems, or set NPR_NSYS\n"


def test_a_slurm_job_starts_one_process_a_task_that_meet_on_the_first_node(tmp_path: Path) -> None:
    """srun and scontrol are stood in for by scripts; the job file itself is a copy, as in Slurm's spool folder."""
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(ROOT / "launch/stage2.sh", spool / "slurm_script")
    executable(tmp_path / "scontrol", "#!/usr/bin/env bash\nprintf 'node%02d\\n' {7..9999}\n")
    executable(
        tmp_path / "srun",
        '#!/usr/bin/env bash\nshift\nfor task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"; done\n',
    )
    python = executable(tmp_path / "python", ECHO)
    done = run(
        ["bash", str(spool / "slurm_script"), "x.toml"],
        NPR_PYTHON=str(python),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="41234",
        SLURM_JOB_NODELIST="node[07-08]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS="4",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"{task} {task % 2} 4 2 node07 21234 -m megatron_npr stage2 x.toml --run.resume auto"
        for task in range(4)
    ]


def test_a_missing_environment_is_one_clear_line(tmp_path: Path) -> None:
    done = run([str(ROOT / "launch/local.sh"), "stage1"], NPR_PYTHON=str(tmp_path / "absent"))
    assert done.returncode == 2
    assert "run 'make setup'" in done.stderr


def test_the_command_runs_as_a_module() -> None:
    done = run([sys.executable, "-m", "megatron_npr", "--version"])
    assert done.stdout.startswith("npr ")
