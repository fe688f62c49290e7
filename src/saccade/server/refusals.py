"""Errors as clients of each API expect them: the status, and the shape of the body.

OpenAI's shape for all but /v1/messages, which has Anthropic's. Next: app.py, which turns every exception into one.
"""

import re
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException

from saccade.base.json_text import to_json
from saccade.errors import NoAnswerError, NumericsError, RequestError
from saccade.server.engine.answers import EngineDown
from saccade.text.tokenizer import TooLongError

ANTHROPIC = "/v1/messages"
FIELD = re.compile(r"[a-z_]+[a-z_0-9.]*(?=: )")  # at the begin of an error that a field is at fault for
NO_NAMES: Mapping[str, str] = MappingProxyType({})  # fields have the names that they have here
TOO_LONG = "context_length_exceeded"  # OpenAI's code of the error
OPENAI_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """A request that is refused: its status, one line, and the field that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code


def blame_field(text: str, names: Mapping[str, str] = NO_NAMES) -> ApiError:
    """The error 400 of a text that begins with the field at fault. `names`: what the request calls fields of ours, and
    the prompt, which is at fault if the text names nothing."""
    found = FIELD.match(text)
    if found is None:
        return ApiError(400, text, names.get("prompt", "prompt"))
    name = names.get(found[0], found[0])
    return ApiError(400, f"{name}{text[found.end() :]}", name)


def blame_request(error: RequestError, names: Mapping[str, str] = NO_NAMES) -> ApiError:
    """The same of an error of ours, with the code that agents know: they shorten the conversation, and ask again."""
    told = blame_field(str(error), names)
    told.code = TOO_LONG if isinstance(error, TooLongError) else None
    return told


def judge(error: Exception) -> ApiError:
    """What our own code raises, as told to a client: the request's fault, or that there is no engine, or no answer."""
    if isinstance(error, ApiError):
        return error
    is_not_finite = isinstance(error, NumericsError)
    has_no_answer = isinstance(error, NoAnswerError) and not is_not_finite  # what the request asks for leaves no token
    is_asker = isinstance(error, RequestError) or has_no_answer
    status = error.status if isinstance(error, EngineDown) else 400 if is_asker else 500
    code = "not_finite" if is_not_finite else "no_answer" if has_no_answer else None
    field = FIELD.match(str(error)) if status == 400 else None
    return ApiError(status, str(error), field and field[0], code)


def is_anthropic(path: str) -> bool:
    return path == ANTHROPIC or path.startswith(ANTHROPIC + "/")


def shape_error(path: str, status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    """The body of an error on `path`."""
    if is_anthropic(path):
        kind = ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": f"req_{uuid.uuid4().hex}"}
    kind = OPENAI_KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def write_refusal(path: str, error: ApiError) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an error on `path`. Anthropic's clients read its id from a header too."""
    shaped = shape_error(path, error.status_code, error.message, error.param, error.code)
    headers = {"content-type": "application/json", **(error.headers or {})}
    if "request_id" in shaped:
        headers["request-id"] = shaped["request_id"]
    return to_json(shaped).encode(), headers


def name_model(name: str, known: tuple[str, ...]) -> ApiError:
    """The error of a request for a model that is not served."""
    text = f"the model {name[:200]!r} is not served here; expected {' or '.join(map(repr, known))}"
    return ApiError(404, text, "model", "model_not_found")
