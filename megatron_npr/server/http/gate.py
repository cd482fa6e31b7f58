"""What every request passes: its key is checked, its status counted."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_npr.server.http.errors import CLIENT_LEFT, ApiError
from megatron_npr.server.metrics import Metrics


class Gate:
    """ASGI middleware. Paths in `free` (health) need no key; only `paths` are counted by their names."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        metrics: Metrics,
        free: Sequence[str],
        paths: Sequence[str],
    ) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._metrics = metrics
        self._free, self._paths = frozenset(free), frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT  # unless a response begins

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["path"] in self._free or self._is_right(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "the API key is missing or wrong: send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response(scope, receive, send)

    def _is_right(self, scope: Scope) -> bool:
        """In a time that does not tell how much of the key is right."""
        assert self._key is not None
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode("latin-1"), self._key)
