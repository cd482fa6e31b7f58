"""`make cuda-check`: compile every CUDA source for sm_90a without a GPU; list registers and spills, fail on warnings.

cuda_ext/csrc/cuda/*.cu ─► nvcc --resource-usage ─► one line a kernel
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ("-O3", "-std=c++20", "--resource-usage", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, \d+ bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel."""

    name: str
    architecture: str
    registers: int
    spilled_bytes: int


def main() -> int:
    """Exit code 0: all compile without a warning; 1: one does not; 2: there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: nvcc is not on PATH: install the CUDA toolkit (13.0 or newer)", file=sys.stderr)
        return 2
    failed = False
    for source in sorted((FOLDER / "csrc" / "cuda").glob("*.cu")):
        kernels, complaint = compile_source(nvcc, source)
        failed |= bool(complaint)
        print(complaint or f"{source.name}: no warnings", flush=True)
        for kernel in kernels:
            usage = f"{kernel.registers:4} registers {kernel.spilled_bytes:4} bytes spilled"
            print(f"  {kernel.architecture:8} {usage}  {kernel.name}")
    return int(failed)


def compile_source(nvcc: str, source: Path) -> tuple[list[Kernel], str]:
    """The kernels of one source, and what the compiler complained about ("" if nothing)."""
    targets = [f"-gencode=arch=compute_{a.removeprefix('sm_')},code={a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            *FLAGS,
            *targets,
            f"-I{FOLDER / 'include'}",
            "-c",
            str(source),
            "-o",
            f"{folder}/out.o",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    kernels = [
        Kernel(demangled(match["name"]), match["arch"], int(match["registers"]), int(match["stores"]))
        for match in _KERNEL.finditer(text)
    ]
    return kernels, "" if done.returncode == 0 else f"{source.name}: nvcc failed\n{text}"


def demangled(name: str) -> str:
    """The C++ name, where c++filt is there to tell it."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    return subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
