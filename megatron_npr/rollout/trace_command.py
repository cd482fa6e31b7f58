"""The `npr trace` command: check rollouts for real concurrency and write a Chrome trace of some."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_npr.runtime.output_place import check_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, help="folder of `npr eval` or `npr demo`, or a rollouts.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("trace.json"), help="for Perfetto or chrome://tracing"
    )
    parser.add_argument("--limit", type=int, default=32, help="rollouts drawn; all are checked (default 32)")
    parser.add_argument("--json", action="store_true", help="the verdict as one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict; exit code 1 where a rollout breaks the order of forks and joins."""
    check_file(arguments.out, '{"traceEvents"', "a trace")
    from megatron_npr.rollout.trace_check import check_and_write

    verdict = check_and_write(arguments.run, arguments.out, limit=arguments.limit)
    print(json.dumps(verdict.record()) if arguments.json else verdict)
    return 1 if verdict.faults else 0
