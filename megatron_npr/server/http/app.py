"""The routes. Each request: body ─► schema ─► prompts ─► Job ─► one reply, or a stream of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_npr.server.generation import Ending, Job, Rules, decode, decode_whole, merged, submit
from megatron_npr.server.http.errors import ApiError, from_user_error
from megatron_npr.server.http.event_stream import EventStream, unless_client_leaves
from megatron_npr.server.http.gate import Gate
from megatron_npr.server.http.openapi import openapi
from megatron_npr.server.http.request_body import read_body
from megatron_npr.server.metrics import Metrics
from megatron_npr.server.prompt_reader import PromptReader
from megatron_npr.server.replies import (
    ChatWriter,
    CompletionWriter,
    ModelCard,
    ModelList,
    Writer,
    usage_of,
)
from megatron_npr.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from megatron_npr.server.served_model import ServedModel
from megatron_npr.server.text.delta import TextDelta
from npr_engine.async_engine import AsyncEngine
from npr_engine.engine import Engine
from npr_ext.errors import UserError

Asked = TypeVar("Asked", bound=GenerationRequest)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


@dataclass(frozen=True)
class Settings:
    """What the server allows. `max_tokens` of one response; `constrain` is the default of requests that branch."""

    max_tokens: int
    api_key: str | None = None
    constrain: bool = True
    max_body_bytes: int = 1 << 20
    ignore_unknown_fields: bool = False


class Server:
    """The endpoints over one engine."""

    def __init__(
        self, service: AsyncEngine, model: ServedModel, settings: Settings, metrics: Metrics
    ) -> None:
        self._service, self._model, self._settings = service, model, settings
        self._reader = PromptReader(model.tokenizer)
        self._card = ModelCard(id=model.name, created=int(time.time()), max_model_len=model.context_length)
        self._metrics = metrics

    async def completions(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        self._check_model(asked.model)
        prompts = await self._reader.completion(asked)
        default = min(COMPLETION_TOKENS, self._settings.max_tokens)
        rules = self._rules(default_max_tokens=default, branching=False)
        name = f"cmpl-{uuid.uuid4().hex}"
        writer = CompletionWriter(
            name,
            int(time.time()),
            self._model.name,
            self._model.vocabulary,
            logprobs=asked.logprobs is not None,
        )
        return await self._generate(request, asked, prompts, asked.max_tokens, rules, name, writer)

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        self._check_model(asked.model)
        prompts = [await self._reader.chat(asked.messages)]
        rules = self._rules(default_max_tokens=self._settings.max_tokens, branching=True)
        name = f"chatcmpl-{uuid.uuid4().hex}"
        writer = ChatWriter(
            name, int(time.time()), self._model.name, self._model.vocabulary, logprobs=asked.logprobs is True
        )
        max_tokens = asked.max_tokens or asked.max_completion_tokens
        return await self._generate(request, asked, prompts, max_tokens, rules, name, writer)

    async def models(self, request: Request) -> Response:
        return _reply(ModelList(data=[self._card]))

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _reply(self._card)

    async def health(self, request: Request) -> Response:
        if not self._service.is_open:
            raise ApiError(503, "the engine has stopped", code="unavailable")
        return JSONResponse({"status": "ok"})

    async def scrape(self, request: Request) -> Response:
        try:
            stats = await self._service.run(Engine.stats)
        except UserError as error:
            raise from_user_error(error) from None
        return Response(self._metrics.text(stats), headers={"Content-Type": METRICS_TYPE})

    async def describe(self, request: Request) -> Response:
        return JSONResponse(openapi())

    async def _read(self, request: Request, model: type[Asked]) -> Asked:
        settings = self._settings
        ignore = settings.ignore_unknown_fields
        return await read_body(request, model, settings.max_body_bytes, ignore_unknown=ignore)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise ApiError(
                404,
                f"there is no model {name!r}: this server has {self._model.name!r}",
                param="model",
                code="model_not_found",
            )

    def _rules(self, *, default_max_tokens: int, branching: bool) -> Rules:
        return Rules(
            default_max_tokens=default_max_tokens,
            max_tokens=self._settings.max_tokens,
            branching=branching,
            constrain=self._settings.constrain,
            context_length=self._model.context_length,
        )

    async def _generate(
        self,
        request: Request,
        asked: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None,
        rules: Rules,
        name: str,
        writer: Writer,
    ) -> Response:
        job = submit(self._service, self._model, self._metrics, asked, prompts, max_tokens, rules, name)
        prompt_tokens = sum(map(len, prompts))
        if asked.stream:
            return EventStream(_stream(job, writer, prompt_tokens, usage=asked.include_usage), job.abort)
        try:
            choices = await unless_client_leaves(request.receive, _whole(job))
        finally:
            job.abort()
        return _reply(writer.whole(choices, usage_of(prompt_tokens, [ending for _, ending in choices])))


async def _whole(job: Job) -> list[tuple[list[TextDelta], Ending]]:
    return await asyncio.gather(*(decode_whole(choice) for choice in job.choices))


async def _stream(job: Job, writer: Writer, prompt_tokens: int, *, usage: bool) -> AsyncGenerator[BaseModel]:
    for index in range(len(job.choices)):
        opening = writer.opening(index)
        if opening is not None:
            yield opening
    endings: list[Ending] = []
    async with aclosing(merged([decode(choice) for choice in job.choices])) as items:
        async for index, item in items:
            if isinstance(item, Ending):
                endings.append(item)
                yield writer.ending(index, item)
            elif item.text or item.tokens:
                yield writer.piece(index, item)
    if usage:
        yield writer.usage(usage_of(prompt_tokens, endings))


def build_app(service: AsyncEngine, model: ServedModel, settings: Settings, metrics: Metrics) -> Starlette:
    """The ASGI application over an engine that runs; closing it is the caller's."""
    server = Server(service, model, settings, metrics)
    routes = [
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{model:path}", server.one_model),
        Route("/health", server.health),
        Route("/metrics", server.scrape),
        Route("/openapi.json", server.describe),
    ]
    gate = Middleware(
        Gate,
        api_key=settings.api_key,
        metrics=metrics,
        free=("/health",),
        paths=[route.path for route in routes],
    )
    return Starlette(
        routes=routes,
        middleware=[gate],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _fault},
    )


def _reply(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, text, headers=error.headers).response


async def _fault(request: Request, error: Exception) -> Response:
    """Ours. It is logged by the server; the client learns its kind alone."""
    return ApiError(500, f"internal error: {type(error).__name__}").response
