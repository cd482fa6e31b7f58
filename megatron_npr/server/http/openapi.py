"""The OpenAPI document, from the models of requests and replies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from megatron_npr import __version__
from megatron_npr.server.http.errors import ErrorReply
from megatron_npr.server.replies import ChatCompletion, Completion, ModelCard, ModelList
from megatron_npr.server.schema import ChatRequest, CompletionRequest

_ERRORS = {
    "400": "malformed, or not to be decoded",
    "401": "no key or a wrong one",
    "404": "no such model or path",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "the body is not application/json",
    "429": "as much is in flight as the engine takes",
    "500": "the model failed",
    "503": "shutting down, or the engine stopped",
}
_MODELS: tuple[type[BaseModel], ...] = (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorReply,
    ModelCard,
    ModelList,
)


def openapi() -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "NPR-Engine", "version": __version__},
        "security": [{"key": []}],
        "paths": {
            "/v1/completions": {"post": _generation(CompletionRequest, Completion)},
            "/v1/chat/completions": {"post": _generation(ChatRequest, ChatCompletion)},
            "/v1/models": {"get": _read("the model that is served", _json(ModelList), "401")},
            "/v1/models/{model}": {
                "get": _read("the model of that name", _json(ModelCard), "401", "404"),
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
            },
            "/health": {"get": _read("whether the engine runs", _json(None), "503") | {"security": []}},
            "/metrics": {"get": _read("Prometheus' text format", {"text/plain": {}}, "401", "503")},
        },
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _generation(request: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    answer = {**_json(reply), "text/event-stream": {}}
    return {
        "summary": request.__doc__,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {
            "200": {"description": "decoded: one reply, or events of chunks and [DONE]", "content": answer},
            **_errors(*_ERRORS),
        },
    }


def _read(summary: str, content: dict[str, Any], *errors: str) -> dict[str, Any]:
    answer = {"200": {"description": summary, "content": content}}
    return {"summary": summary, "responses": {**answer, **_errors(*errors)}}


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: {"description": _ERRORS[status], "content": _json(ErrorReply)} for status in statuses}


def _json(model: type[BaseModel] | None) -> dict[str, Any]:
    schema = {"type": "object"} if model is None else {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"application/json": {"schema": schema}}
