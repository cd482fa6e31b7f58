"""Reads a JSON body of bounded size and time into a request."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from megatron_npr.server.http.errors import CLIENT_LEFT, ApiError, from_validation, path_of, unknown_fields

SECONDS = 30.0
DRAINED = 16  # times the limit: a client that reads only after it has sent gets its answer

LOGGED = 8  # unknown fields of a request that are named
LOG = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)


async def read_body(
    request: Request, model: type[Model], max_bytes: int, *, ignore_unknown: bool = False
) -> Model:
    """The body as `model`; with `ignore_unknown` without the fields that it does not have, which are logged.

    Raises:
        ApiError: not JSON by its content type (415; a web page may send others to any host unasked), too large (413),
            too slow (408), malformed or of other fields (400), the client left (499).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be sent as application/json, not {kind or 'without a type'}")
    try:
        async with asyncio.timeout(SECONDS):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client left") from None
    try:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            unknown = unknown_fields(error)
            if not (ignore_unknown and unknown):
                raise
            return model.model_validate_json(_without(unknown, body))
    except ValidationError as error:
        raise from_validation(error) from None


def _without(unknown: Sequence[Sequence[int | str]], body: bytes) -> str:
    """The body less the fields at these places."""
    content: Any = json.loads(body)
    for *outer, name in unknown:
        holder = reduce(lambda inner, part: inner[part], outer, content)
        holder.pop(name, None)
    named = ", ".join(repr(path_of(places)) for places in unknown[:LOGGED])
    rest = f" and {len(unknown) - LOGGED} more" if len(unknown) > LOGGED else ""
    LOG.warning("npr: unknown fields ignored: %s%s", named, rest)
    return json.dumps(content)


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "")
    large = announced.isdecimal() and int(announced) > max_bytes
    if large and request.headers.get("expect", "").lower() == "100-continue":
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > DRAINED * max_bytes:
            break
        if size <= max_bytes:
            parts.append(part)
    if size > max_bytes:
        raise too_large
    return b"".join(parts)
