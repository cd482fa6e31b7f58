"""Over HTTP, with OpenAI's own client and without: the engine's text, its errors in OpenAI's shape, and nothing left behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from megatron_npr.server.http.app import Settings
from megatron_npr.server.served_model import ServedModel, load_model
from npr_engine.engine import Engine, EngineConfig
from npr_engine.language.grammar import Grammar
from npr_engine.model.transformer import InferenceModel, KVCache, Step
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from tests.support.padded import padded_folder
from tests.unit.server.conftest import FOLDER, KV_SLOTS, another
from tests.unit.server.running import Running, eventually, running

QUESTION = "Sort by cost: pen=59*6, cup=13*5, map=43*6\nWork in parallel"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
CHAT = {"messages": MESSAGES, "seed": 3, "temperature": 0.7, "max_tokens": 300}


def decoded(model: ServedModel, prompt: str = PROMPT, sample: int = 0, **params: Any) -> Rollout:
    """By the engine alone."""
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    return model.engine.generate([ids], SamplingParams(**params), [str(sample)])[0]


def text_of(model: ServedModel, rollout: Rollout) -> str:
    ids = [token for token in rollout.token_ids.tolist() if token != model.vocabulary.eos_id]
    return model.vocabulary.text(ids)


def branches_of(model: ServedModel, rollout: Rollout) -> dict[int, str]:
    """The text of the trunk and of each branch."""
    eos = model.vocabulary.eos_id
    return {
        branch: model.vocabulary.text(
            [t for t, b in zip(rollout.token_ids.tolist(), rollout.branch_ids) if b == branch and t != eos]
        )
        for branch in sorted(set(rollout.branch_ids.tolist()))
    }


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def branched(demo: ServedModel) -> Rollout:
    """What the chat of this file decodes to."""
    rollout = decoded(demo, max_tokens=300, max_critical_path=300, temperature=0.7, seed=3, constrain=True)
    assert rollout.branch_ids.max() >= 2, "these tests need branches"
    return rollout


def test_a_completion_is_the_engines_text(client: httpx.Client, demo: ServedModel) -> None:
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    reply = client.post("/v1/completions", json=body).json()
    rollout = decoded(demo, max_tokens=60, temperature=0.0, branching=False)
    choice = reply["choices"][0]
    assert choice["text"] == text_of(demo, rollout)
    assert choice["npr_finish_reason"] == rollout.finish_reason
    assert reply["usage"]["completion_tokens"] == rollout.num_tokens
    assert reply["usage"]["prompt_tokens"] == len(rollout.prompt_ids)


def test_a_chat_forks_and_joins_as_the_engine_does(
    client: httpx.Client, demo: ServedModel, branched: Rollout
) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT).json()
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text_of(demo, branched)}
    assert choice["npr_finish_reason"] == branched.finish_reason
    assert reply["usage"] == {
        "prompt_tokens": len(branched.prompt_ids),
        "completion_tokens": branched.num_tokens,
        "total_tokens": len(branched.prompt_ids) + branched.num_tokens,
        "critical_path_tokens": branched.critical_path,
        "forced_tokens": int(branched.forced.sum()),
    }


def test_pieces_of_a_stream_make_up_the_whole(
    client: httpx.Client, demo: ServedModel, branched: Rollout
) -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == branched.num_tokens
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text_of(demo, branched)
    assert [choice["npr_finish_reason"] for choice in choices if choice["finish_reason"]] == [
        branched.finish_reason
    ]
    texts: dict[int, str] = {}
    forced = ""
    for choice in choices:
        piece, place = choice["delta"].get("content", ""), choice["npr"]
        texts[place["branch"]] = texts.get(place["branch"], "") + piece
        forced += piece if place["forced"] else ""
    assert texts == branches_of(demo, branched)
    assert forced == demo.vocabulary.text(branched.token_ids[branched.forced].tolist())


def test_interleaved_branches_come_side_by_side(
    client: httpx.Client, demo: ServedModel, branched: Rollout
) -> None:
    with client.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "interleave": True}
    ) as response:
        choices = [chunk["choices"][0] for chunk in events(response)]
    texts: dict[int, str] = {}
    for choice in choices:
        branch = choice["npr"]["branch"]
        texts[branch] = texts.get(branch, "") + choice["delta"].get("content", "")
    assert texts == branches_of(demo, branched)
    order = [choice["npr"]["branch"] for choice in choices]
    last_of_first = max(place for place, branch in enumerate(order) if branch == 1)
    assert order.index(2) < last_of_first, "the second branch waited for the first"


def test_several_choices_are_drawn_apart_and_again_with_a_seed(
    client: httpx.Client, demo: ServedModel
) -> None:
    body = {"prompt": [PROMPT, "Sort by"], "n": 3, "seed": 11, "max_tokens": 20}
    replies = [client.post("/v1/completions", json=body).json() for _ in range(2)]
    texts = [[choice["text"] for choice in reply["choices"]] for reply in replies]
    assert texts[0] == texts[1]
    rollouts = [
        decoded(demo, prompt, sample, max_tokens=20, seed=11, branching=False)
        for prompt in (PROMPT, "Sort by")
        for sample in range(3)
    ]
    assert texts[0] == [text_of(demo, rollout) for rollout in rollouts]
    assert len(set(texts[0])) == 6
    usage = replies[0]["usage"]
    assert usage["completion_tokens"] == sum(rollout.num_tokens for rollout in rollouts)
    assert usage["critical_path_tokens"] == max(rollout.critical_path for rollout in rollouts)
    unseeded = {"prompt": ["Sort"] * 4, "max_tokens": 60, "temperature": 2}
    drawn = [choice["text"] for choice in client.post("/v1/completions", json=unseeded).json()["choices"]]
    assert len(set(drawn)) > 1, "equal prompts without a seed are drawn apart"


def test_token_ids_are_a_prompt_too(client: httpx.Client, demo: ServedModel) -> None:
    ids = demo.tokenizer.encode(PROMPT, add_special_tokens=False)
    replies = [
        client.post("/v1/completions", json={"prompt": prompt, "temperature": 0}).json()["choices"][0]["text"]
        for prompt in (PROMPT, ids, [ids], [PROMPT])
    ]
    assert len(set(replies)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_response_across_tokens(
    stream: bool, served: Running, client: httpx.Client, demo: ServedModel
) -> None:
    rollout = decoded(demo, max_tokens=60, temperature=0.0, branching=False)
    pieces = [demo.vocabulary.text([token]) for token in rollout.token_ids.tolist()]
    text = "".join(pieces)
    middle = len("".join(pieces[:30]))
    stop = text[middle - 2 : middle + 2]
    assert stop not in pieces
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stop": ["never", stop], "stream": stream}
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as response:
            choices = [chunk["choices"][0] for chunk in events(response)]
    else:
        choices = client.post("/v1/completions", json=body).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
    assert (choices[-1]["finish_reason"], choices[-1]["npr_finish_reason"]) == ("stop", "stopped")
    eventually(served.is_idle)


def test_log_probabilities_are_those_of_the_engine(
    client: httpx.Client, demo: ServedModel, branched: Rollout
) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT | {"logprobs": True}).json()
    tokens = reply["choices"][0]["logprobs"]["content"]
    expected = [
        None if forced else pytest.approx(float(logprob), abs=1e-4)
        for token, forced, logprob in zip(branched.token_ids, branched.forced, branched.logprobs)
        if token != demo.vocabulary.eos_id
    ]
    assert [token["logprob"] for token in tokens] == expected
    whole = b"".join(bytes(token["bytes"]) for token in tokens).decode()
    assert whole == reply["choices"][0]["message"]["content"]
    reply = client.post("/v1/completions", json={"prompt": PROMPT, "logprobs": 0, "temperature": 0}).json()
    rollout = decoded(demo, max_tokens=16, temperature=0.0, branching=False)
    assert reply["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
        rollout.logprobs.tolist(), abs=1e-4
    )


def test_openais_client_is_served(served: Running, demo: ServedModel, branched: Rollout) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    extra = {"constrain": True, "max_branches": 8}
    stream = client.chat.completions.create(
        model="demo", stream=True, extra_body=extra, stream_options={"include_usage": True}, **CHAT
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == text_of(demo, branched)
    assert usage is not None and usage.completion_tokens == branched.num_tokens
    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, temperature=0)
    assert completion.choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="echo: only false is supported"):
        client.completions.create(model="demo", prompt="a", echo=True)


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
    with socket.create_connection((address.host, address.port or 0), timeout=30) as connection:
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(stream: bool, served: Running, client: httpx.Client) -> None:
    path = "/v1/chat/completions"
    status = "200" if stream else "499"
    ended = served.count("npr_requests_total", path=path, status=status)
    sampled = served.stats().sampled_tokens
    with served.engine_held():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + path, json=CHAT | {"stream": stream, "n": 3}, timeout=0.3)
        assert served.service.num_in_flight == 3
        eventually(lambda: served.count("npr_requests_total", path=path, status=status) == ended + 1)
    eventually(served.is_idle)
    assert served.stats().sampled_tokens == sampled
    assert served.stats().running == served.stats().waiting == 0


def test_more_than_the_engine_takes_is_turned_away(demo: ServedModel) -> None:
    body = {"prompt": PROMPT, "temperature": 0}
    with running(another(demo), Settings(max_tokens=50), max_in_flight=2) as server:
        url = f"{server.url}/v1/completions"
        first: list[httpx.Response] = []
        with server.engine_held():
            thread = threading.Thread(target=lambda: first.append(httpx.post(url, json=body, timeout=60)))
            thread.start()
            eventually(lambda: server.service.num_in_flight == 1)
            response = httpx.post(url, json=body | {"n": 2})
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
        thread.join()
        assert first[0].status_code == 200
        eventually(server.is_idle)
        assert httpx.post(url, json=body | {"n": 2}).status_code == 200
        assert server.stats().waiting == 0


def test_without_the_key_nothing_but_health_is_told(demo: ServedModel) -> None:
    with running(another(demo), Settings(max_tokens=50, api_key="secret")) as server:
        body = {"prompt": "a", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert client.completions.create(model="demo", prompt="a", max_tokens=1).usage is not None
        assert server.count("npr_requests_total", path="/v1/completions", status="401") == 3


def test_metrics_are_what_has_happened(demo: ServedModel) -> None:
    with running(another(demo), Settings(max_tokens=300)) as server:
        usage = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60).json()["usage"]
        httpx.post(f"{server.url}/v1/completions", json={})
        response = httpx.get(f"{server.url}/metrics")
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in families.values()
            for sample in family.samples
        }
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert values["npr_requests_total", "/v1/chat/completions", "200"] == 1
        assert values["npr_requests_total", "/v1/completions", "400"] == 1
        assert values["npr_prompt_tokens_total",] == usage["prompt_tokens"]
        assert values["npr_generated_tokens_total",] == usage["completion_tokens"]
        assert values["npr_forced_tokens_total",] == usage["forced_tokens"] > 0
        assert sum(value for key, value in values.items() if key[0] == "npr_choices_total") == 1
        assert values["npr_time_to_first_token_seconds_count",] == values["npr_tokens_per_second_count",] == 1
        assert values["npr_running",] == values["npr_waiting",] == 0
        assert values["npr_kv_blocks_total",] == KV_SLOTS // EngineConfig.block_size
        assert 0 < values["npr_kv_blocks_used",] < values["npr_kv_blocks_total",]


class FailingModel(InferenceModel):
    """The model, but its forward raises what `fault` gives."""

    fault: Callable[[], BaseException | None] = staticmethod(lambda: None)

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        fault = self.fault()
        if fault is not None:
            raise fault
        return super().forward(step, cache)


@pytest.fixture
def failing(demo: ServedModel) -> tuple[FailingModel, ServedModel]:
    import torch

    from megatron_npr.hf.huggingface import read_engine_weights, read_model_config

    config = read_model_config(FOLDER)
    model = FailingModel(config, read_engine_weights(FOLDER, config, torch.float32, torch.device("cpu")))
    engine = Engine(model, Grammar(demo.vocabulary), EngineConfig(num_kv_slots=4096))
    return model, replace(demo, engine=engine)


def test_a_failure_of_the_model_is_a_500_and_later_requests_are_served(
    failing: tuple[FailingModel, ServedModel],
) -> None:
    model, served_model = failing
    body = {"prompt": "a", "max_tokens": 3}
    with running(served_model, Settings(max_tokens=50)) as server:
        url = f"{server.url}/v1/completions"
        model.fault = lambda: RuntimeError("the device is gone")
        response = httpx.post(url, json=body)
        assert response.status_code == 500
        assert "the device is gone" in response.json()["error"]["message"]
        with httpx.stream("POST", url, json=body | {"stream": True}) as stream:
            assert stream.status_code == 200
            assert events(stream)[-1]["error"]["code"] == "generation_failed"
        model.fault = lambda: None
        assert httpx.post(url, json=body).status_code == 200
        assert server.count("npr_choices_total", outcome="error") == 2


def test_a_server_without_its_engine_is_unhealthy(failing: tuple[FailingModel, ServedModel]) -> None:
    model, served_model = failing
    body = {"prompt": "a", "max_tokens": 3}
    with running(served_model, Settings(max_tokens=50)) as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        model.fault = lambda: SystemExit("a fault that is no model's")
        for _ in range(2):
            response = httpx.post(f"{server.url}/v1/completions", json=body)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "10"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 503
        served_model.engine.fail_all("error(test)")  # so that it ends empty


def test_a_server_that_shuts_down_ends_what_is_in_flight_with_503(demo: ServedModel) -> None:
    with running(another(demo), Settings(max_tokens=300)) as server:
        answers: list[httpx.Response] = []
        url = f"{server.url}/v1/chat/completions"
        with server.engine_held():
            thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=CHAT, timeout=60)))
            thread.start()
            eventually(lambda: server.service.num_in_flight == 1)
            closing = threading.Thread(target=server.service.close)
            closing.start()
            eventually(lambda: not server.service.is_open)
            assert httpx.post(url, json=CHAT).status_code == 503
        closing.join()
        thread.join()
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["message"] == "the server is shutting down"


def test_every_eos_of_generation_config_ends_a_response_and_is_no_text(tmp_path: Path) -> None:
    folder = padded_folder(tmp_path / "model", second_eos=True)
    model = load_model(folder, name="padded", dtype=torch.float32, kv_slots=KV_SLOTS)
    body = {"prompt": PROMPT, "n": 12, "seed": 1, "max_tokens": 200}
    with running(model, Settings(max_tokens=200)) as server, httpx.Client(base_url=server.url) as http:
        reply = http.post("/v1/completions", json=body, timeout=60).json()
    ended = [choice["text"] for choice in reply["choices"] if choice["npr_finish_reason"] == "eos"]
    assert len(ended) > 6
    silent = [model.vocabulary.pieces[token].decode() for token in model.vocabulary.eos_ids]
    assert not any(text in choice["text"] for choice in reply["choices"] for text in silent)
