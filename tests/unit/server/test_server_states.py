"""A server over its life: clients that leave, too much work, a key, metrics, a model that fails, a shutdown."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
from tests.support.padded import padded_folder
from tests.support.patience import SECONDS
from tests.unit.server.conftest import FOLDER, KV_SLOTS, another
from tests.unit.server.requests import CHAT, PROMPT, events
from tests.unit.server.running import Running, eventually, running


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
            thread = threading.Thread(
                target=lambda: first.append(httpx.post(url, json=body, timeout=SECONDS))
            )
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
        usage = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=SECONDS).json()["usage"]
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
            thread = threading.Thread(
                target=lambda: answers.append(httpx.post(url, json=CHAT, timeout=SECONDS))
            )
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
        reply = http.post("/v1/completions", json=body, timeout=SECONDS).json()
    ended = [choice["text"] for choice in reply["choices"] if choice["npr_finish_reason"] == "eos"]
    assert len(ended) > 6
    silent = [model.vocabulary.pieces[token].decode() for token in model.vocabulary.eos_ids]
    assert not any(text in choice["text"] for choice in reply["choices"] for text in silent)
