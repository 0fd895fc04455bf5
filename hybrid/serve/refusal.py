"""What a client is told when its request cannot be met, in the envelope of the API it called."""

import json
from collections.abc import Mapping
from typing import Any, NotRequired

from fastapi import Response
from typing_extensions import TypedDict

from hybrid.chat.forms import BadField
from hybrid.engine.request import Closed
from hybrid.errors import ContextExceeded, KimiError, UsageError

ANTHROPIC = "/v1/messages"


class ErrorFacts(TypedDict):
    message: str
    type: str
    param: NotRequired[str | None]
    code: NotRequired[str | None]


class ErrorBody(TypedDict):
    """OpenAI's envelope; Anthropic's has `type: "error"` beside it."""

    error: ErrorFacts


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused; `error.param` names what is wrong."},
    503: {"model": ErrorBody, "description": "An error has ended the engine; the server must be started again."},
}
STREAMED = DOCUMENTED | {200: {"content": {"text/event-stream": {}}, "description": "With `stream`: events."}}

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "not_supported_error",
}


class Refusal(Exception):
    """`status` is HTTP's; `param` names the field that is wrong, `code` is a word for programs."""

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
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "server_error")


def envelope(path: str, refusal: Refusal) -> dict[str, Any]:
    """The body that clients of the API under `path` expect."""
    if path.startswith(ANTHROPIC):
        kind = refusal.kind if refusal.status in KINDS else "api_error"
        return {"type": "error", "error": {"type": kind, "message": refusal.message}}
    error = {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": refusal.code}
    return {"error": error}


def refuse(path: str, refusal: Refusal) -> Response:
    return json_response(envelope(path, refusal), refusal.status, refusal.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, "application/json")


def to_json(body: Any) -> str:
    """Compact and ASCII only: whatever a client sent, half a surrogate pair included, can be told back to it."""
    return json.dumps(body, separators=(",", ":"))


def bad_request(error: KimiError, prompt: str = "messages") -> Refusal:
    """The refusal of a request for which `error` was raised before anything was computed; `prompt` is the field that
    says what is to be answered."""
    if isinstance(error, Closed):
        remedy = "The server must be started again; its log says why."
        return Refusal(503, f"{error.message} {remedy}", code="engine_closed")
    if isinstance(error, BadField):
        return Refusal(400, str(error), param=error.param, code=error.code)
    if isinstance(error, ContextExceeded):
        return Refusal(400, str(error), param=prompt, code="context_length_exceeded")
    return Refusal(400, str(error), code="invalid_value" if isinstance(error, UsageError) else None)


def failure(error: KimiError) -> Refusal:
    """The same for an error in the middle of an answer."""
    return Refusal(500, str(error))


def unsupported(param: str, message: str) -> Refusal:
    """A feature that is not there, refused by the name of the field that asks for it."""
    return Refusal(400, message, param=param, code="unsupported_parameter")
