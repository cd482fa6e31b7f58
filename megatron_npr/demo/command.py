"""The `npr demo` command: all stages on the small model; exit code 1 where a threshold is missed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_npr.runtime.output_place import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--seed", type=int, help="root of every random number (default 0; the last run's with --resume)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the last demo instead of a new one")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/demo"), help="where it goes (default runs/demo)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run or continue the demo; a missed threshold is a line on standard error."""
    check_folder(arguments.dir)
    from megatron_npr.demo import run as demo

    missed = demo.run(arguments.dir, seed=arguments.seed, resume=arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        for threshold in missed:
            print(f"npr: missed: {threshold}", file=sys.stderr, flush=True)
    return 1 if missed else 0
