"""The `npr serve` command: a model over HTTP, as OpenAI's clients know it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", type=Path, help="Hugging Face folder whose tokenizer holds the tags")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    parser.add_argument("--api-key", help="what clients must send (default: $NPR_API_KEY, else none)")
    parser.add_argument(
        "--max-in-flight", type=int, default=256, help="responses at once; more get 429 (default 256)"
    )
    parser.add_argument("--kv-slots", type=int, default=65_536, help="tokens in memory (default 65536)")
    parser.add_argument(
        "--max-tokens", type=int, help="of a response (default: the model's context if it fits)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default float32)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    parser.add_argument(
        "--no-constrain",
        action="store_true",
        help="branching responses may break the format unless asked not to",
    )
    parser.add_argument(
        "--ignore-unknown-fields",
        action="store_true",
        help="of requests, with a line in the log (default: refused by name)",
    )
    parser.add_argument(
        "--drain-seconds", type=int, default=30, help="for responses in flight when it ends (default 30)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    from megatron_npr.server.run import ServeOptions, serve

    serve(
        ServeOptions(
            folder=arguments.model,
            host=arguments.host,
            port=arguments.port,
            api_key=os.environ.get("NPR_API_KEY") if arguments.api_key is None else arguments.api_key,
            max_in_flight=arguments.max_in_flight,
            kv_slots=arguments.kv_slots,
            max_tokens=arguments.max_tokens,
            dtype=arguments.dtype,
            threads=arguments.threads,
            name=arguments.served_model_name,
            constrain=not arguments.no_constrain,
            drain_seconds=arguments.drain_seconds,
            ignore_unknown_fields=arguments.ignore_unknown_fields,
        )
    )
    return 0
