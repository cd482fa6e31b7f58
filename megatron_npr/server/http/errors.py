"""What goes wrong with a request, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from megatron_npr.server.schema import SHAPES
from npr_engine.async_engine import ClosedError, OverloadedError
from npr_ext.errors import UserError

CLIENT_LEFT = 499
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
    """The first field that is wrong, with all that it could have been."""
    found = error.errors(include_url=False, include_context=True)
    if found[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found[0]['ctx']['error']}", code="invalid_json")
    field = _field(found[0])
    reasons = dict.fromkeys(_reason(entry) for entry in found if _field(entry) == field)
    if len(reasons) > 1 and field in SHAPES:  # one of several types, and none fits
        reasons = {f"must be {SHAPES[field]}": None}
    return ApiError(400, f"{field or 'body'}: {', '.join(reasons)}", param=field)


def _field(entry: ErrorDetails) -> str | None:
    return str(entry["loc"][0]) if entry["loc"] else None


def _reason(entry: ErrorDetails) -> str:
    match entry["type"]:
        case "literal_error":
            return f"only {entry['ctx']['expected'].lower()} is supported"
        case "extra_forbidden":
            return "this server knows no such field"
        case "value_error":
            return str(entry["ctx"]["error"])
        case _:
            place = ".".join(str(part) for part in entry["loc"][1:] if _is_place(part))
            text = entry["msg"][:1].lower() + entry["msg"][1:]
            return f"at {place}: {text}" if place else text


def _is_place(part: int | str) -> bool:
    """Whether it is an index or a field; unions put the names of their types between them."""
    return isinstance(part, int) or (part != "str" and "[" not in part)
