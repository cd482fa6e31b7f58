"""What goes wrong with a request, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from megatron_npr.server.schema import SHAPES
from npr_engine.async_engine import ClosedError, OverloadedError
from npr_ext.errors import UserError

CLIENT_LEFT = 499
NAME = 64  # characters of an unknown field's name that an answer repeats
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """What is wrong: `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """A request that failed."""

    error: ErrorBody


class ApiError(Exception):
    """A request that ends with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message, self.param, self.code = message, param, code
        self.headers = dict(headers or {})

    @property
    def reply(self) -> ErrorReply:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return ErrorReply(error=ErrorBody(message=self.message, type=kind, param=self.param, code=self.code))

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.reply.model_dump(), self.status, self.headers)


def from_user_error(error: UserError) -> ApiError:
    """Turned away by the engine: for now, for good, or because the request cannot be decoded."""
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": "10"})
    return ApiError(400, str(error))


def from_validation(error: ValidationError) -> ApiError:
    """The first field that is wrong, with all that it could have been; a field or a choice that does not exist, by its path."""
    found = error.errors(include_url=False, include_context=True)
    if found[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found[0]['ctx']['error']}", code="invalid_json")
    for entry in found:
        if entry["type"] in ("extra_forbidden", "literal_error") and len(places := _places(entry)) > 1:
            path = path_of(places)
            return ApiError(400, f"{path}: {_reason(entry)}", param=path)
    field = path_of(_places(found[0])[:1]) or None
    reasons = dict.fromkeys(_reason(entry) for entry in found if entry["loc"][:1] == found[0]["loc"][:1])
    if len(reasons) > 1 and field in SHAPES:  # one of several types, and none fits
        reasons = {f"must be {SHAPES[field]}": None}
    return ApiError(400, f"{field or 'body'}: {', '.join(reasons)}", param=field)


def unknown_fields(error: ValidationError) -> list[list[int | str]]:
    """Where the body has fields that it may not have: keys and indices from its root."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [_places(entry) for entry in found if entry["type"] == "extra_forbidden"]


def _places(entry: ErrorDetails) -> list[int | str]:
    """Keys and indices that lead to it; unions put the names of their types between them."""
    *inner, last = entry["loc"] or (None,)
    places = [part for part in inner if isinstance(part, int) or (part != "str" and "[" not in part)]
    return [*places, last] if last is not None else places


def path_of(places: Sequence[int | str]) -> str:
    """As in messages[0].content[1].text; a name that a client made up is cut."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:NAME]}" for part in places)
    return "".join(parts).removeprefix(".")


def _reason(entry: ErrorDetails) -> str:
    match entry["type"]:
        case "literal_error":
            return f"only {entry['ctx']['expected'].lower()} is supported"
        case "extra_forbidden":
            return "this server knows no such field"
        case "value_error":
            return str(entry["ctx"]["error"])
        case _:
            place = ".".join(map(str, _places(entry)[1:]))
            text = entry["msg"][:1].lower() + entry["msg"][1:]
            return f"at {place}: {text}" if place else text
