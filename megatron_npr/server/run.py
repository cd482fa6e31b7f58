"""`npr serve`: from a folder to a server that ends gracefully.

check, bind ─► load the model ─► AsyncEngine ─► uvicorn ─► signal: what is in flight ends ─► engine closed ─► exit 0
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from megatron_npr.config.section import MOST_THREADS
from megatron_npr.server.http.app import Settings, build_app
from megatron_npr.server.metrics import Metrics
from megatron_npr.server.served_model import load_model
from npr_engine.async_engine import AsyncEngine
from npr_engine.engine import EngineConfig
from npr_engine.kvcache.block_pool import slots_needed
from npr_ext.errors import UserError

LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """The command line. By default `max_tokens` depends on the model; 0 threads are all of the machine's."""

    folder: Path
    host: str
    port: int
    api_key: str | None
    max_in_flight: int
    kv_slots: int
    max_tokens: int | None
    dtype: str
    threads: int
    name: str | None
    constrain: bool
    drain_seconds: int
    ignore_unknown_fields: bool = False


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or Ctrl-C; a second Ctrl-C does not wait for what is in flight. UserError where it
    cannot."""
    _check(options)
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    with bound_socket(options.host, options.port) as listener:
        dtype = getattr(torch, options.dtype)
        model = load_model(options.folder, name=options.name, dtype=dtype, kv_slots=options.kv_slots)
        limit = options.max_tokens or min(model.context_length, options.kv_slots // 2)
        if limit > model.context_length:
            print(
                f"npr: warning: --max-tokens {limit} is more than the model's context {model.context_length} "
                "(max_position_embeddings in its config.json), which ends every response",
                file=sys.stderr,
                flush=True,
            )
        settings = Settings(
            limit, options.api_key, options.constrain, ignore_unknown_fields=options.ignore_unknown_fields
        )
        service = AsyncEngine(model.engine, options.max_in_flight)
        try:
            config = uvicorn.Config(
                build_app(service, model, settings, Metrics()),
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=options.drain_seconds,
            )
            _announce(listener, model.name, options)
            with _signals_taken():
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            service.close()


def _check(options: ServeOptions) -> None:
    for flag, value, least in (
        ("--max-in-flight", options.max_in_flight, 1),
        ("--kv-slots", options.kv_slots, 64),
        ("--max-tokens", 1 if options.max_tokens is None else options.max_tokens, 1),
        ("--threads", options.threads, 0),
        ("--drain-seconds", options.drain_seconds, 0),
    ):
        if value < least:
            raise UserError(f"{flag} is {value}, it must be >= {least}")
    if options.threads > MOST_THREADS:
        raise UserError(f"--threads is {options.threads}, it must be <= {MOST_THREADS}")
    if options.max_tokens and slots_needed(1, options.max_tokens, EngineConfig.block_size) > options.kv_slots:
        raise UserError(
            f"--max-tokens {options.max_tokens} does not fit into --kv-slots {options.kv_slots}: lower one or raise the other"
        )
    if options.api_key is not None and not (options.api_key.isascii() and options.api_key.strip()):
        raise UserError(
            "the API key is empty or not ASCII: leave it out, or give one that a header can carry"
        )


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that does not listen yet, so that nobody waits while the model is loaded; UserError where the address
    cannot be had."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}, it must be in [0, 65535] (0: any free one)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot serve at {host}:{port}: {error.strerror}; choose another --port or --host"
            ) from None
        yield listener


def _announce(listener: socket.socket, name: str, options: ServeOptions) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"serving {name} at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
    if options.api_key is None and not options.host.startswith(LOOPBACK):
        print(
            "npr: whoever reaches this address may use it: there is no --api-key", file=sys.stderr, flush=True
        )


@contextmanager
def _signals_taken() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, for whoever stood behind it: here the end is wanted."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
