"""The `npr draw` command: a small response's layout as an SVG picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_npr.runtime.output_place import check_file
from megatron_npr.runtime.whole_file import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("name", choices=("layout",), help="what to draw")
    parser.add_argument(
        "--out", type=Path, default=Path("layout.svg"), help="SVG to write (default layout.svg)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw it, over a picture that stands there and over nothing else."""
    check_file(arguments.out, "<svg", "a picture")
    from megatron_npr.report.layout_picture import draw

    write_whole(arguments.out, draw())
    print(arguments.out)
    return 0
