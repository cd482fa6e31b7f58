"""How much a server decodes behind a prompt: what it was asked for, or what its memory has left, in the words of its client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from megatron_npr.cli import main
from megatron_npr.server.http.app import Settings
from megatron_npr.server.served_model import ServedModel
from npr_engine.engine import Engine, EngineConfig
from npr_engine.kvcache.block_pool import BlockPool, slots_needed
from npr_engine.language.grammar import Grammar
from tests.support.patience import SECONDS
from tests.unit.server.conftest import FOLDER
from tests.unit.server.running import running

SLOTS = 256
WORDS = [{"role": "user", "content": "Sort by cost: pen=59*6, cup=13*5\nWork in parallel"}]


@pytest.fixture(scope="module")
def client(demo: ServedModel) -> Iterator[httpx.Client]:
    """A client of a server whose memory holds less than its limit and a prompt."""
    engine = Engine(demo.engine.model, Grammar(demo.vocabulary), EngineConfig(num_kv_slots=SLOTS))
    with (
        running(replace(demo, engine=engine), Settings(max_tokens=250)) as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as http,
    ):
        yield http


@pytest.mark.parametrize(
    ("path", "body", "most"),
    [
        ("completions", {"prompt": [20] * 250}, 3),
        ("completions", {"prompt": [20] * 253, "stream": False}, 3),
        ("completions", {"prompt": [20] * 100}, 16),
        ("chat/completions", {"messages": WORDS, "temperature": 0}, 250),
    ],
)
def test_a_request_without_a_limit_gets_what_there_is(
    path: str, body: dict[str, Any], most: int, client: httpx.Client
) -> None:
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == 200, reply.text
    assert 1 <= reply.json()["usage"]["completion_tokens"] <= most


@pytest.mark.parametrize(
    ("path", "body", "param", "text"),
    [
        (
            "completions",
            {"prompt": [20] * 260},
            None,
            "260 tokens, the server's memory too few (--kv-slots of npr serve)",
        ),
        (
            "completions",
            {"prompt": [20] * 200, "max_tokens": 60},
            "max_tokens",
            "at most 55 a response behind a prompt of 200",
        ),
        (
            "chat/completions",
            {"messages": WORDS, "max_tokens": 240},
            "max_tokens",
            "max_tokens is 240, this server decodes",
        ),
        (
            "chat/completions",
            {"messages": WORDS, "max_completion_tokens": 240},
            "max_completion_tokens",
            "max_completion_tokens is 240, this server decodes at most",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_the_fields_of_the_request(
    path: str, body: dict[str, Any], param: str | None, text: str, client: httpx.Client
) -> None:
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == 400
    assert text in reply.json()["error"]["message"] and reply.json()["error"]["param"] == param
    assert "num_kv_slots" not in reply.text


def test_the_room_behind_a_prompt_is_the_largest_budget_whose_slots_there_are() -> None:
    for block_size in (1, 4, 5, 16):
        pool = BlockPool(8, block_size)
        for prompt in range(1, pool.num_slots + 3):
            fits = [
                0,
                *(
                    n
                    for n in range(1, pool.num_slots)
                    if slots_needed(prompt, n, block_size) <= pool.num_slots
                ),
            ]
            assert max(pool.room_behind(prompt), 0) == fits[-1]


def test_a_limit_that_memory_never_holds_is_refused_when_the_server_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", str(FOLDER), "--port", "0", "--max-tokens", "4096", "--kv-slots", "4096"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "npr: error: --max-tokens 4096 does not fit into --kv-slots 4096: lower one or raise the other\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--kv-slots", "99999999999", "--kv-slots = 99999999999: their keys and values take "),
        ("--threads", "100000", "--threads is 100000, it must be <= 1024"),
    ],
)
def test_what_no_machine_has_is_refused_before_it_is_asked_for(
    option: str, value: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(FOLDER), "--port", "0", option, value]) == 2
    assert capsys.readouterr().err.startswith(f"npr: error: {named}")
