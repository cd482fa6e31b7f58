"""The `npr base` command: make the demo's base model from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_npr.runtime.output_place import check_folder

SHIPPED = Path(__file__).parents[1] / "assets" / "demo_base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial weights and the corpus (default 0)"
    )
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="Hugging Face folder to write (default: the shipped one)"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that stands there")


def run(arguments: argparse.Namespace) -> int:
    """Train the model and write its folder; UserError where one stands there already."""
    check_folder(arguments.out)
    from megatron_npr.demo import train_base

    train_base.run(arguments.out, seed=arguments.seed, replace=arguments.force)
    return 0
