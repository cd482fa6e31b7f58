"""Builds the C++ operators of npr_ext; everything else about the project stands in pyproject.toml."""

import os
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
PACKAGE_DIR = {
    "megatron_npr": "megatron_npr",
    "npr_engine": "engine/npr_engine",
    "npr_ext": "cuda_ext/npr_ext",
}

CUDA_TARGETS = runpy.run_path(str(ROOT / "cuda_ext/cuda_check.py"))["TARGETS"]


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


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext/csrc").glob(pattern))


def extension() -> Extension:
    optional = [flag for flag in ("-march=native",) if compiler_accepts(flag)]
    cpp_flags = [
        "-O3",
        "-std=c++20",
        "-ffp-contract=fast",
        "-fopenmp",
        "-Wall",
        "-Wno-unknown-pragmas",
        *optional,
    ]
    shared = {
        "include_dirs": [str(ROOT / "cuda_ext/include")],
        "depends": sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext/include").rglob("*.h")),
        "extra_link_args": ["-fopenmp"],
    }
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        print("npr_ext: building the CPU operators only (CUDA ones need nvcc and a CUDA build of torch)")
        return CppExtension("npr_ext._C", sources("*.cpp"), extra_compile_args=cpp_flags, **shared)
    return CUDAExtension(
        "npr_ext._C",
        [*sources("*.cpp"), *sources("cuda/*.cpp"), *sources("cuda/*.cu")],
        extra_compile_args={"cxx": cpp_flags, "nvcc": ["-O3", "-std=c++20", *CUDA_TARGETS]},
        **shared,
    )


setup(
    packages=packages(),
    package_dir=PACKAGE_DIR,
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
