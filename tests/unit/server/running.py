"""A real server on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from megatron_npr.server.http.app import Settings, build_app
from megatron_npr.server.metrics import Metrics
from megatron_npr.server.run import bound_socket
from megatron_npr.server.served_model import ServedModel
from npr_engine.async_engine import AsyncEngine
from npr_engine.engine import EngineStats
from tests.support.patience import SECONDS


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until something holds; fails where it never does."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    service: AsyncEngine
    model: ServedModel
    metrics: Metrics

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def stats(self) -> EngineStats:
        return asyncio.run(self.service.run(lambda engine: engine.stats()))

    def is_idle(self) -> bool:
        return self.service.num_in_flight == 0

    @contextmanager
    def engine_held(self) -> Iterator[None]:
        """The engine's thread takes no message and no step inside."""
        held, released = threading.Event(), threading.Event()

        def hold(engine: object) -> None:
            held.set()
            released.wait(SECONDS)

        thread = threading.Thread(target=lambda: asyncio.run(self.service.run(hold)))
        thread.start()
        assert held.wait(SECONDS)
        try:
            yield
        finally:
            released.set()
            thread.join()


@contextmanager
def running(model: ServedModel, settings: Settings, max_in_flight: int = 64) -> Iterator[Running]:
    """Serves a model; at the end its engine is empty and whole."""
    service, metrics = AsyncEngine(model.engine, max_in_flight), Metrics()
    app = build_app(service, model, settings, metrics)
    with bound_socket("127.0.0.1", 0) as listener:
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, model, metrics)
        finally:
            server.should_exit = True
            thread.join()
            service.close()
    model.engine.check_integrity()
    assert model.engine.num_unfinished == 0
