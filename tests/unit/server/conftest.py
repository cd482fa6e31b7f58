"""The demo's base model, served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from megatron_npr.server.http.app import Settings
from megatron_npr.server.served_model import ServedModel, load_model
from npr_engine.engine import Engine, EngineConfig
from npr_engine.language.grammar import Grammar
from tests.support.patience import SECONDS
from tests.unit.server.running import Running, running

FOLDER = Path("megatron_npr/assets/demo_base")
KV_SLOTS = 16_384


def another(model: ServedModel) -> ServedModel:
    """A served model of equal weights with an engine of its own."""
    engine = Engine(model.engine.model, Grammar(model.vocabulary), EngineConfig(num_kv_slots=KV_SLOTS))
    return replace(model, engine=engine)


@pytest.fixture(scope="session")
def demo() -> ServedModel:
    """Loaded as `npr serve` loads it; its engine is the tests' own, no server uses it."""
    return load_model(FOLDER, name="demo", dtype=torch.float32, kv_slots=KV_SLOTS)


@pytest.fixture(scope="session")
def served(demo: ServedModel) -> Iterator[Running]:
    """One server for all tests that leave it as they find it."""
    with running(another(demo), Settings(max_tokens=400)) as server:
        yield server


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    """A client of the server that `served` runs."""
    with httpx.Client(base_url=served.url, timeout=SECONDS) as http:
        yield http
