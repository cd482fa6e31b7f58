"""`make gpu`: what one GPU does with every part of the system; writes tests/bench/results/<device>.json.

for each part, in a process of its own: measured ─► its figures into the file at once ─► table: threshold, measured, held

A part whose packages are not installed is skipped with one line; one that fails leaves the others their
figures (GPU time is borrowed). torch, npr_ext and npr_engine are enough for all but training. Exit code: 0
also where a threshold is missed, 1 where a part failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_npr.bench.gpu.part import PARTS
from megatron_npr.bench.gpu.result import read_result, result_file, table, thresholds, write_result

RESULTS = Path(__file__).parents[3] / "tests" / "bench" / "results"


def main(words: Sequence[str] | None = None) -> int:
    """Measure the parts that are named, all without a name, and write them down; 1 where a part failed, 2 without
    a GPU."""
    parser = argparse.ArgumentParser(prog="gpu bench", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes on the CPU: shows that the bench runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the file")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    if not arguments.tiny and not torch.cuda.is_available():
        print(
            "gpu bench: no CUDA device is visible to torch: run it on a machine with a GPU", file=sys.stderr
        )
        return 2
    device = "tiny cpu" if arguments.tiny else torch.cuda.get_device_name(0)
    failed = measure(arguments.parts or list(PARTS), device, arguments.results, tiny=arguments.tiny)
    return 1 if failed else 0


def measure(names: Sequence[str], device: str, folder: Path, *, tiny: bool) -> list[str]:
    """Runs the parts and prints the table; the names of those that failed."""
    path, failed = result_file(folder, device), []
    for name in names:
        result = read_result(path) | {"device": device, "torch": torch.__version__}
        missing = PARTS[name].missing()
        print(f"gpu bench: {name}: {PARTS[name].what}", file=sys.stderr, flush=True)
        if missing:
            reason = f"skipped: not installed: {', '.join(missing)}"
        else:
            code, figures = _run(name, tiny=tiny)
            reason = "" if figures is not None else f"failed with exit code {code}"
        if reason:
            print(f"gpu bench: {name} {reason}", file=sys.stderr, flush=True)
            result["not_measured"] |= {name: reason}
            failed += [] if missing else [name]
        else:
            result["parts"] |= {name: figures}
            result["not_measured"].pop(name, None)
        write_result(path, result)
    result = read_result(path)
    missed = [str(threshold) for threshold in thresholds(result["parts"]) if not threshold.held]
    print(table(result["parts"]))
    for line in [*missed, *(f"{name} {reason}" for name, reason in result["not_measured"].items())]:
        print(f"gpu bench: {line}")
    print(path)
    return failed


def _run(name: str, *, tiny: bool) -> tuple[int, object | None]:
    """(exit code, figures of one part or None): in a process of its own, so that its memory is gone and its errors stay."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "megatron_npr.bench.gpu.part", name, str(file)]
        done = subprocess.run([*command, *(["--tiny"] if tiny else [])], check=False)
        return done.returncode, json.loads(file.read_text()) if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
