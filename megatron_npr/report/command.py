"""The `npr report` command: build the report of a finished demo again."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_npr.report import rebuild


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/demo"), help="default runs/demo")


def run(arguments: argparse.Namespace) -> int:
    """Write report.html and report.json, and print where the page is."""
    print(rebuild(arguments.folder))
    return 0
