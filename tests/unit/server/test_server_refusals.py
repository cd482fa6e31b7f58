"""What is no request, over HTTP: each mistake is told in OpenAI's shape and nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.patience import SECONDS
from tests.unit.server.requests import CHAT, MESSAGES
from tests.unit.server.running import Running


@pytest.mark.parametrize(
    "path, body, status, text",
    [
        ("completions", {"prompt": "a", "logprobs": 2}, 400, "logprobs: only 0 is supported"),
        ("completions", {"prompt": "a", "max_tokens": 401}, 400, "at most 400"),
        ("completions", {"prompt": "a", "max_tokenz": 4}, 400, "max_tokenz: this server knows no such field"),
        ("completions", {"prompt": "a", "stop": list("abcde")}, 400, "stop: must be a string of"),
        ("completions", {"prompt": {}}, 400, "prompt: must be a text, a list of token ids"),
        ("completions", {"prompt": [340]}, 400, "token ids in [0, 340)"),
        ("completions", {"prompt": ""}, 400, "prompt: must be a text"),
        ("completions", {"prompt": [5] * 2048}, 400, "the model's context 2048"),
        (
            "chat/completions",
            {"messages": MESSAGES, "max_completion_tokens": 401},
            400,
            "max_completion_tokens is 401",
        ),
        ("completions", {"prompt": "a", "n": 65}, 400, "n: input should be less"),
        ("completions", {"prompt": ["a"] * 33, "n": 2}, 400, "n x prompts are 66"),
        ("completions", {"prompt": "a", "constrain": True}, 400, "it needs branching"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options are for"),
        (
            "completions",
            {"prompt": "a", "temperature": "1"},
            400,
            "temperature: input should be a valid number",
        ),
        ("completions", {}, 400, "prompt: field required"),
        ("completions", [], 400, "body: input should be an object"),
        ("completions", {"prompt": "a", "model": "x"}, 404, "there is no model 'x'"),
        ("chat/completions", {"messages": []}, 400, "messages: list should have at least 1 item"),
        (
            "chat/completions",
            {"messages": [{"role": "x", "content": ""}]},
            400,
            "messages[0].role: only 'system'",
        ),
        ("chat/completions", CHAT | {"max_completion_tokens": 3}, 400, "two names of one limit"),
        ("chat/completions", CHAT | {"top_logprobs": 1}, 400, "top_logprobs: only 0 is supported"),
    ],
)
def test_mistakes_are_told_in_openais_shape(
    path: str, body: Any, status: int, text: str, client: httpx.Client
) -> None:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert text in error["message"]


@pytest.mark.parametrize(
    "content, headers, status",
    [
        (b'{"prompt": "a"', {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"", {}, 400),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (b" " * ((1 << 20) + 1), {}, 413),
    ],
)
def test_bodies_that_are_no_request_are_refused(
    content: bytes, headers: dict[str, str], status: int, client: httpx.Client
) -> None:
    sent = {"Content-Type": "application/json"} | headers
    response = client.post("/v1/completions", content=content, headers=sent)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_without_an_announced_length_is_bounded_too(client: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    response = client.post("/v1/completions", content=parts(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_a_body_that_waits_for_permission_is_refused_before_it_is_sent(served: Running) -> None:
    import socket

    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port or 0), timeout=SECONDS) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_paths_and_methods_that_are_not_there_are_told(client: httpx.Client) -> None:
    for response, status in (
        (client.get("/v1/nothing"), 404),
        (client.get("/v1/completions"), 405),
        (client.get("/v1/models/other"), 404),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/models/demo").json()["id"] == "demo"
