"""Fields that the server does not know are named by their path or, where that is asked for, ignored with a line in the log;
what OpenAI's client makes of a reply is a message."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import openai
import pytest

from megatron_npr.server.http.app import Settings
from megatron_npr.server.served_model import ServedModel
from tests.support.patience import SECONDS
from tests.unit.server.conftest import another
from tests.unit.server.running import Running, running

USER = {"role": "user", "content": "2+3="}
PART = {"type": "text", "text": "2+3="}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 4, "temperature": 0, **fields}


UNKNOWN = {
    "of the body": (chat(USER, foo=1), "foo"),
    "of a message": (chat(USER | {"foo": 1}), "messages[0].foo"),
    "of a later message": (chat(USER, USER | {"cache_control": {}}), "messages[1].cache_control"),
    "of a content part": (chat(USER | {"content": [PART, PART | {"foo": 1}]}), "messages[0].content[1].foo"),
    "named as a type": (chat(USER | {"str": 1}), "messages[0].str"),
    "with brackets": (chat(USER | {"content": [PART | {"a[b]": 1}]}), "messages[0].content[0].a[b]"),
    "of the stream's options": (
        chat(USER, stream=True, stream_options={"foo": 1}),
        "stream_options.foo",
    ),
    "of the response's format": (
        chat(USER, response_format={"type": "text", "foo": 1}),
        "response_format.foo",
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_field_is_named_by_its_path(kind: str, client: httpx.Client) -> None:
    body, path = UNKNOWN[kind]
    response = client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["message"], error["param"]) == (f"{path}: this server knows no such field", path)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "tool", "content": "", "tool_call_id": "1"}, "messages[0].role: only 'system', "),
        (
            USER | {"content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].type: only 'text'",
        ),
        (USER | {"tool_calls": [{"id": "1"}]}, "messages: at 0.tool_calls"),
        (USER | {"audio": {"id": "1"}}, "messages: at 0.audio"),
        (USER | {"refusal": "no"}, "messages[0].refusal: only '' is supported"),
    ],
)
def test_what_is_known_and_not_supported_is_told(
    message: dict[str, Any], told: str, client: httpx.Client
) -> None:
    response = client.post("/v1/chat/completions", json=chat(message))
    assert response.status_code == 400 and told in response.json()["error"]["message"]


def test_a_long_name_is_not_repeated(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=chat(USER | {"x" * 100_000: 1}))
    assert response.status_code == 400 and len(response.content) < 500


def test_a_reply_of_openais_client_is_a_message(served: Running) -> None:
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    ask: Any = api.chat.completions.create
    reply = ask(model="demo", messages=[USER], max_tokens=8, temperature=0).choices[0].message
    dumped = reply.model_dump()
    assert "refusal" in dumped and "tool_calls" in dumped, "the client writes all fields that it knows"
    plain = {"role": "assistant", "content": reply.content}
    answers = [
        ask(model="demo", messages=[USER, turn, USER], max_tokens=8, temperature=0).choices[0].message.content
        for turn in (plain, dumped, reply, dumped | {"tool_calls": [], "annotations": [], "refusal": ""})
    ]
    assert len(set(answers)) == 1


def test_unknown_fields_are_ignored_with_a_line_in_the_log(
    demo: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(max_tokens=50, ignore_unknown_fields=True)
    with (
        running(another(demo), settings) as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as http,
    ):
        (expected,) = {
            http.post("/v1/chat/completions", json=chat(USER)).json()["choices"][0]["message"]["content"]
        }
        for body, path in UNKNOWN.values():
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                response = http.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            assert [record.message for record in caplog.records if "unknown" in record.message] == [
                f"npr: unknown fields ignored: '{path}'"
            ]
            if not body.get("stream") and body["messages"] == [USER]:
                assert response.json()["choices"][0]["message"]["content"] == expected
        many = chat(USER | {f"a\n{index}": 1 for index in range(1000)})
        caplog.clear()
        assert http.post("/v1/chat/completions", json=many).status_code == 200
        (line,) = [record.message for record in caplog.records if "unknown" in record.message]
        assert "\n" not in line and line.endswith("and 992 more")
        wrong = http.post("/v1/chat/completions", json=chat(USER, foo=1, top_p=7))
        assert wrong.status_code == 400 and "top_p" in wrong.json()["error"]["message"]
