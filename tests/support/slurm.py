"""A real Slurm on this machine for the length of a with-block: two nodes on ports of their own, nothing outside a folder.

with cluster(folder) as slurm: job = slurm.submit("launch/stage3.sh", ...); slurm.run("scontrol", "requeue", job)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.patience import SECONDS

NEEDED = ("setpriv", "slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "squeue")

# A job that is requeued starts again when its credential has expired (cred_expire, 120 s by default).
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """The running cluster; its commands find it through SLURM_CONF."""

    folder: Path
    nodes: tuple[str, ...]

    def run(self, *words: str, **variables: str) -> str:
        """What a command of Slurm's says; AssertionError where it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, **variables: str) -> str:
        """The number of a new job."""
        return self.run("sbatch", "--parsable", *words, **variables)

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState."""
        shown = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in shown if word.startswith(f"{name}="))

    def wait(self, job: str, state: str) -> None:
        """Until the job is in the state; AssertionError where it ends in another."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        wait_for(lambda: self.field(job, "JobState") in {state, *ends}, f"job {job} {state}")
        assert self.field(job, "JobState") == state


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    absent = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found (Debian: slurmctld, slurmd, slurm-client, munge)"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root alone"


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """Start it, wait until the nodes are idle, end it with its jobs."""
    names = tuple(f"node{number}" for number in range(1, nodes + 1))
    folder.mkdir(parents=True, exist_ok=True)
    _configure(folder, names)
    with contextlib.ExitStack() as running:
        _start(running, folder, "munged", "--foreground", "--force", *_munge_files(folder))
        wait_for((folder / "munge.socket").exists, "munged")
        _start(running, folder, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for name in names:
            _start(running, folder, "slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", name)
        slurm = Cluster(folder, names)
        wait_for(lambda: _num_idle(slurm) == nodes, "idle nodes")
        try:
            yield slurm
        finally:
            slurm.run("scancel", "--signal=KILL", "--full", "--user=root")
            slurm.run("scancel", "--user=root")
            wait_for(lambda: slurm.run("squeue", "--noheader") == "", "the end of all jobs")


def wait_for(reached: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Until it is so; AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def _configure(folder: Path, names: tuple[str, ...]) -> None:
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    control, *ports = _free_ports(1 + len(names))
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
        for name, port in zip(names, ports, strict=True)
    ]
    text = CONFIGURATION.format(host=host, control=control, folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(text)


def _munge_files(folder: Path) -> list[str]:
    names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder}/munge.{name}" for option, name in names.items()]


def _start(running: contextlib.ExitStack, folder: Path, *words: str) -> None:
    log = running.enter_context((folder / f"{words[0]}-{Path(words[-1]).name}.out").open("w"))
    environment = {**os.environ, "PATH": _path()}
    words = ("setpriv", "--pdeathsig", "TERM", *words)  # nobody runs on for tests that were killed
    process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
    running.callback(process.wait)
    running.callback(process.terminate)


def _num_idle(slurm: Cluster) -> int:
    with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
        return slurm.run("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    return 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _path() -> str:
    """Daemons lie where a user's PATH may not lead."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
