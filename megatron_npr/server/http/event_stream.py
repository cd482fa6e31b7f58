"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from megatron_npr.server.http.errors import CLIENT_LEFT, ApiError

Result = TypeVar("Result")


class EventStream(StreamingResponse):
    """Replies as events. `on_end` is called however it ends, also before it has begun."""

    def __init__(self, replies: AsyncGenerator[BaseModel], on_end: Callable[[], None]) -> None:
        super().__init__(
            _events(replies), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _events(replies: AsyncGenerator[BaseModel]) -> AsyncGenerator[str]:
    """A failure is an event too: the status has been sent."""
    try:
        async with aclosing(replies) as items:
            async for reply in items:
                yield f"data: {reply.model_dump_json()}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.reply.model_dump())}\n\n"
    yield "data: [DONE]\n\n"


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; it is cancelled, and ApiError raised, when the client leaves before. The request's body
    must have been read."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_leaves(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_LEFT, "the client left")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
