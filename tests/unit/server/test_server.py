"""Over HTTP, with OpenAI's own client and without: what the server sends is the engine's text."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from megatron_npr.server.served_model import ServedModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from tests.unit.server.requests import CHAT, PROMPT, events
from tests.unit.server.running import Running, eventually


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
