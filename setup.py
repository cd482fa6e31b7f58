"""Builds the C++ operators of npr_ext; everything else about the project stands in pyproject.toml."""

import platform
import runpy
import shutil
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
PACKAGE_DIR = {
    "megatron_npr": "megatron_npr",
    "megatron_npr.configs": "configs",
    "npr_engine": "engine/npr_engine",
    "npr_ext": "cuda_ext/npr_ext",
}

# What every processor must have that runs the operators; cuda_ext/csrc/cpu/isa_*.cpp hold faster ones for some.
BASE = ["-march=x86-64-v3"] if platform.machine() in ("x86_64", "AMD64") else []
CUDA_TARGETS = runpy.run_path(str(ROOT / "cuda_ext/cuda_check.py"))["TARGETS"]


def packages() -> list[str]:
    found = []
    for name, folder in PACKAGE_DIR.items():
        found += [name, *(f"{name}.{child}" for child in find_packages(str(ROOT / folder)))]
    return found


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext/csrc").glob(pattern))


def extension() -> Extension:
    cpp_flags = [
        "-O3",
        "-g1",  # names and lines for a backtrace; all of it makes the library three times as large
        "-std=c++20",
        "-ffp-contract=fast",
        "-fopenmp",
        "-Wall",
        "-Wno-unknown-pragmas",
        *BASE,
    ]
    shared = {
        "include_dirs": [str(ROOT / "cuda_ext/include")],
        "depends": sources("**/*.h") + sources("../include/npr/**/*.h"),
        "extra_link_args": ["-fopenmp"],
    }
    cpu = sources("*.cpp") + sources("cpu/*.cpp")
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        print("npr_ext: building the CPU operators only (CUDA ones need nvcc and a CUDA build of torch)")
        return CppExtension("npr_ext._operators", cpu, extra_compile_args=cpp_flags, **shared)
    return CUDAExtension(
        "npr_ext._operators",
        [*cpu, *sources("cuda/*.cpp"), *sources("cuda/*.cu")],
        extra_compile_args={"cxx": cpp_flags, "nvcc": ["-O3", "-std=c++20", *CUDA_TARGETS]},
        **shared,
    )


setup(
    packages=packages(),
    package_dir=PACKAGE_DIR,
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
