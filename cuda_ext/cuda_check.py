"""`make cuda-check`: compile every CUDA source without a GPU; list registers and spills, fail on warnings.

cuda_ext/csrc/cuda/*.cu  ─► nvcc --resource-usage ─► one line a kernel
cuda_ext/csrc/cuda/*.cpp ─► the C++ compiler, syntax only, against torch's headers

setup.py takes the architectures from here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
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
    for source in sorted((FOLDER / "csrc" / "cuda").glob("*.cpp")):
        complaint = check_binding(nvcc, source)
        failed |= bool(complaint)
        print(complaint or f"{source.name}: no warnings", flush=True)
    return int(failed)


def check_binding(nvcc: str, source: Path) -> str:
    """What the C++ compiler complains about ("" if nothing).

    A CPU build of torch has the headers of c10/cuda, all but a generated one: its one line is written here.
    """
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.submodule_search_locations, "torch is not installed"
    headers = Path(torch.submodule_search_locations[0]) / "include"
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "c10/cuda/impl/cuda_cmake_macros.h"
        generated.parent.mkdir(parents=True)
        generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
        command = [os.environ.get("CXX", "g++"), "-fsyntax-only", "-std=c++20", "-Wall", "-Werror"]
        command += [f"-I{FOLDER / 'include'}", f"-isystem{headers}", f"-isystem{cuda_home(nvcc) / 'include'}"]
        command += [f"-isystem{folder}", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{source.name}: the compiler failed\n{done.stderr}"


def cuda_home(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself names it (nvcc on PATH may be a script that calls another)."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    assert found is not None, done.stderr
    return Path(found[1])


def compile_source(nvcc: str, source: Path) -> tuple[list[Kernel], str]:
    """The kernels of one source, and what the compiler complained about ("" if nothing)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            *FLAGS,
            *TARGETS,
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
