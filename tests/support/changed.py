"""`make check`: pytest on the test files that what changed can reach.

    files that differ from the merge base with main, or are new
    ──► modules that import one of them, and modules that import those, and so on
    ──► test files among them; folders whose conftest.py is among them
    ──► tests/unit/repository, which reads every file, and the tests of configurations, scripts and repairs (BY_FOLDER)

Imports are read from the source, modules and workers that are named in a string too. A changed file of C++, of the build or
of what all tests share runs every test that `make test` runs.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.support.places import ROOT

PACKAGES = {
    "megatron_npr": "megatron_npr",
    "npr_engine": "engine/npr_engine",
    "npr_ext": "cuda_ext/npr_ext",
    "tests": "tests",
}
"""Where each package lies below the project's folder."""
EVERYTHING = {"pyproject.toml", "setup.py", "Makefile", "tests/conftest.py"}
COMPILED = {".h", ".cpp", ".cu"}
EVERY_FILE = "tests/unit/repository"
"""Reads all sources and pages: sizes, links, names."""
BY_FOLDER = {
    "configs/": ("tests/unit/config", "tests/unit/planning"),
    "launch/": ("tests/unit/launch",),
    "megatron_npr/repairs/": ("tests/unit/repairs",),
}
"""Tests that read a folder's files other than by an import."""
MARKS = "not slow and not gpu and not shared"


def changed_files(since: str) -> list[str]:
    """Paths below the project's folder that differ from the merge base with a commit, uncommitted and new ones too."""
    base = git("merge-base", since, "HEAD")[0]
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def module_files() -> dict[str, str]:
    """Every module's name and its file, below the project's folder."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = str(path.relative_to(ROOT))
    return found


def imported(path: Path, modules: dict[str, str]) -> set[str]:
    """Files of ours that a file imports, packages on the way to them too; a test file uses the conftest.py above it besides."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # imported by string, as the command line does
            if path.parent.name == "distributed":
                names.add(f"tests.distributed.workers.{node.value}")
    parents = {
        ".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 2)
    }
    files = {modules[name] for name in parents if name in modules}
    if path.name.startswith("test_"):
        above = [parent / "conftest.py" for parent in path.relative_to(ROOT).parents]
        files.update(str(each) for each in above if str(each) not in EVERYTHING and (ROOT / each).is_file())
    return files


def reached(changed: Iterable[str]) -> list[str]:
    """The test files that a change of these files can reach."""
    modules = module_files()
    users: dict[str, set[str]] = {}
    for file in modules.values():
        for used in imported(ROOT / file, modules):
            users.setdefault(used, set()).add(file)
    seen: set[str] = set()
    waiting = list(changed)
    while waiting:
        if (file := waiting.pop()) not in seen:
            seen.add(file)
            waiting += users.get(file, ())
    return sorted(file for file in seen if Path(file).name.startswith("test_") and (ROOT / file).is_file())


def reading(changed: Sequence[str]) -> list[str]:
    """The folders of tests that read these files as texts."""
    found = {
        folder
        for file in changed
        for begin in BY_FOLDER
        if file.startswith(begin)
        for folder in BY_FOLDER[begin]
    }
    return sorted({EVERY_FILE, *found}) if changed else []


def main() -> int:
    parser = argparse.ArgumentParser(description="pytest on the test files that what changed can reach")
    parser.add_argument(
        "--since", default="main", help="commit or branch; what differs from the merge base counts"
    )
    parser.add_argument("--list", action="store_true", help="print the test files and run nothing")
    arguments = parser.parse_args()
    changed = changed_files(arguments.since)
    all_tests = any(file in EVERYTHING or Path(file).suffix in COMPILED for file in changed)
    files = ["tests"] if all_tests else [*reached(changed), *reading(changed)]
    print(
        f"{len(changed)} files changed since {arguments.since}; tests in: {' '.join(files) or 'none'}",
        flush=True,
    )
    if arguments.list or not files:
        return 0
    return subprocess.call([sys.executable, "-m", "pytest", "-m", MARKS, *files], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
