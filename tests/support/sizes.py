"""`make sizes`: how long functions, files and folders are, and which pass the limits.

Lines of a function run from its first decorator or `def` to its last line, docstring and comments included; a function inside
of another counts by itself too. Those of C++ come from braces, not from a compiler: a body that follows a parenthesis in a
namespace or class is a function.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.places import ROOT

GROUPS = {
    "Python": ("megatron_npr", "engine", "cuda_ext", "setup.py"),
    "tests": ("tests",),
    "C++ and CUDA": ("cuda_ext", "tests"),
    "shell": ("launch",),
}
SUFFIXES = {
    "Python": (".py",),
    "tests": (".py",),
    "C++ and CUDA": (".h", ".cpp", ".cu", ".cuh"),
    "shell": (".sh",),
}
MOST = {90: 22, 99: 45, 100: 80}
"""Percentile of the lines of Python functions: the most that it may be; 100 is the longest."""
LINES_OF_A_FILE = 400
FILES_OF_A_FOLDER = 15


@dataclass(frozen=True, order=True)
class Function:
    """A function's size, and where it begins."""

    lines: int
    place: str
    """`path:line name`"""


def source_files(group: str) -> list[Path]:
    """The files of a group, sorted; an empty `__init__.py` is none."""
    found: list[Path] = []
    for name in GROUPS[group]:
        start = ROOT / name
        candidates = [start] if start.is_file() else start.rglob("*")
        found += (path for path in candidates if path.suffix in SUFFIXES[group] and path.stat().st_size)
    return sorted(found)


def functions(path: Path) -> Iterator[Function]:
    """The functions of one Python, C++ or CUDA file; shell files have none here."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                assert node.end_lineno is not None
                yield Function(node.end_lineno - first + 1, f"{name}:{first} {node.name}")
    elif path.suffix != ".sh":
        for first, last, header in braced_functions(text):
            yield Function(last - first + 1, f"{name}:{first} {header}")


def braced_functions(text: str) -> Iterator[tuple[int, int, str]]:
    """First line, last line and name of each function of a C++ text."""
    text = without_texts_and_comments(text)
    open_at: list[tuple[str, int, str]] = []  # kind, first line, name of every brace that is open
    start = 0
    for match in re.finditer(r"[{};]", text):
        place = match.start()
        if match[0] == "{":
            header = text[start:place]
            kind = kind_of(header) if all(kind == "scope" for kind, _, _ in open_at) else "inside"
            first = text.count("\n", 0, start + len(header) - len(header.lstrip())) + 1
            names = re.findall(r"([\w:~]+|operator\W+)\s*\(", header)
            open_at.append((kind, first, names[0] if names else ""))
            if kind == "initializer":
                continue
        elif match[0] == "}" and open_at:
            kind, first, name = open_at.pop()
            if kind == "function":
                yield first, text.count("\n", 0, place) + 1, name
            if kind == "initializer":
                continue
        start = place + 1


def kind_of(header: str) -> str:
    """What a brace at the level of a namespace or class opens, from the text before it."""
    header = re.sub(r"template\s*<[^{}]*?>(?=\s*\w)", "", header)
    if re.search(r"\)\s*:.*\w\s*$", header, re.S) and not re.search(r"\)\s*$", header):
        return "initializer"  # of a member, before the body of a constructor
    if "(" not in header and re.search(r"\b(namespace|class|struct|union|extern)\b", header):
        return "scope"
    return "function" if "(" in header and "=" not in header.split("(")[0] else "value"


def without_texts_and_comments(text: str) -> str:
    """A C++ text with its comments, literals and preprocessor lines blank; line breaks stay."""
    hidden = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*'
    return re.sub(hidden, lambda found: "\n" * found[0].count("\n"), text, flags=re.S | re.M)


def percentile(lines: list[int], share: int) -> int:
    """The smallest of the sizes that `share` percent of them do not pass."""
    return sorted(lines)[max(0, math.ceil(len(lines) * share / 100) - 1)]


def too_long() -> list[str]:
    """A line for every limit that is passed; functions of C++ have the one of the longest alone."""
    said = []
    for group, shares in {"Python": MOST, "tests": MOST, "C++ and CUDA": {100: MOST[100]}}.items():
        sizes = [function.lines for path in source_files(group) for function in functions(path)]
        for share, most in shares.items():
            if (is_now := percentile(sizes, share)) > most:
                said.append(
                    f"{group}: {is_now} lines at the {share}th percentile of functions, at most {most}"
                )
    files = {path for group in GROUPS for path in source_files(group)}
    counts = Counter(path.parent for path in files)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(files)}
    said += [
        f"{path.relative_to(ROOT)}: {lines} lines, at most {LINES_OF_A_FILE}"
        for path, lines in lengths.items()
        if lines > LINES_OF_A_FILE
    ]
    said += [
        f"{folder.relative_to(ROOT)}/: {count} source files, at most {FILES_OF_A_FOLDER}"
        for folder, count in sorted(counts.items())
        if count > FILES_OF_A_FOLDER
    ]
    return said


def table() -> Iterator[str]:
    """A line for each group: its files, lines and functions."""
    yield f"{'':14}{'files':>7}{'lines':>9}{'functions':>11}{'p50':>6}{'p90':>6}{'p99':>6}{'max':>6}  longest function"
    for group in GROUPS:
        paths = source_files(group)
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        found = sorted(function for path in paths for function in functions(path))
        yield f"{group:14}{len(paths):7,}{lines:9,}{len(found):11,}" + row_end(found)


def row_end(found: list[Function]) -> str:
    if not found:
        return ""
    sizes = [function.lines for function in found]
    shares = "".join(f"{percentile(sizes, share):6}" for share in (50, 90, 99, 100))
    return f"{shares}  {found[-1].place}"


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def main() -> int:
    say(table())
    passed = too_long()
    print("limits passed:" if passed else "no limit is passed")
    say(f"  {line}" for line in passed)
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
