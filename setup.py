"""Builds the C++ operators of npr_ext; everything else about the project stands in pyproject.toml."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
PACKAGE_DIR = {
    "megatron_npr": "megatron_npr",
    "npr_engine": "engine/npr_engine",
    "npr_ext": "cuda_ext/npr_ext",
}


def packages() -> list[str]:
    found = []
    for name, folder in PACKAGE_DIR.items():
        found += [name, *(f"{name}.{child}" for child in find_packages(str(ROOT / folder)))]
    return found


def compiler_accepts(flag: str) -> bool:
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [compiler, flag, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def cpu_extension() -> CppExtension:
    optional = [flag for flag in ("-march=native",) if compiler_accepts(flag)]
    return CppExtension(
        "npr_ext._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext/csrc").glob("*.cpp")),
        include_dirs=[str(ROOT / "cuda_ext/include")],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext/include").rglob("*.h")),
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-ffp-contract=fast",
            "-fopenmp",
            "-Wall",
            "-Wno-unknown-pragmas",
            *optional,
        ],
        extra_link_args=["-fopenmp"],
    )


def announce_cuda() -> None:
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        print("npr_ext: building the CPU operators only (CUDA ones need nvcc and a CUDA build of torch)")


announce_cuda()
setup(
    packages=packages(),
    package_dir=PACKAGE_DIR,
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
