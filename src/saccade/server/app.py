"""The application: routes of every API, and each exception as an error of the API that it happened in.

Knows no process and no socket. Next: run.py, which serves it; apis/ for what the routes do.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from saccade import __version__
from saccade.base.memory import is_refusal
from saccade.base.near import find_near
from saccade.base.values import show
from saccade.errors import SaccadeError
from saccade.look.page import POLICY, make_page
from saccade.server.apis.chat import route_chat
from saccade.server.apis.completions import route_completions
from saccade.server.apis.messages import route_messages
from saccade.server.apis.responses import route_responses
from saccade.server.apis.tokens import route_tokens
from saccade.server.bodies import respond
from saccade.server.guard import App, Guard, Receive, Scope, Send
from saccade.server.refusals import ApiError, judge, write_refusal
from saccade.server.service import Service

LAST = {"extra_forbidden": 2, "missing": 1}  # of problems at one place: what is wrong itself is told before these
NO_OBJECT = ("union_tag_not_found", "model_type", "model_attributes_type", "dict_type")
KIND_TAG = re.compile(r"\b(\w+)=")  # how one_of writes which object it is
STATUSES = {
    400: "The request cannot be served; the error names the field.",
    401: "No API key of this server came with it.",
    404: "Another model is served here.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    415: "The body is not application/json, or is compressed.",
    429: "The queue is full; `Retry-After` says for how long.",
    500: "The engine or the model failed on this request, or a bug of the server.",
    503: "The engine has failed, or the server is ending.",
}


def make_app(service: Service) -> FastAPI:
    """The application for a model that is served."""
    app = FastAPI(title="Saccade", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.ignored_fields = service.settings.ignored_fields
    responses: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in STATUSES.items()}
    routes = (route_state, route_completions, route_chat, route_messages, route_responses, route_tokens)
    routers = [route(service) for route in routes]
    for router in routers:
        app.include_router(router, responses=responses)
    app.add_exception_handler(RequestValidationError, show_invalid)
    app.add_exception_handler(HTTPException, show_refused)
    app.add_exception_handler(SaccadeError, show_failed)
    app.add_exception_handler(Exception, show_bug)
    app.add_middleware(Guard, settings=service.settings, is_ending=lambda: service.is_ending)
    # Not app.openapi()["paths"]: the description takes 0.3 s, and few ask for it.
    held = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    paths = [route.path for route in held if route.include_in_schema]
    app.add_middleware(CountedRequests, service=service, paths=paths)
    if service.settings.origins:  # before the guard: a browser asks first, without a key
        origins = list(service.settings.origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


def route_state(service: Service) -> APIRouter:
    """How the server is, and what it serves."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def show_page() -> Response:
        """A chat, for a browser, that shows where answers look."""
        headers = {"content-security-policy": f"{POLICY}; frame-ancestors 'none'", "cache-control": "no-cache"}
        return HTMLResponse(make_page(title=service.name), headers=headers)

    @router.get("/health")
    async def tell_health() -> Response:
        """200 while requests can be answered, else 503 and why not."""
        if service.engine.failure is not None:
            return respond({"status": "failed", "reason": service.engine.failure}, 503)
        return respond({"status": "ending"}, 503) if service.is_ending else respond({"status": "ok"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def tell_metrics() -> Response:
        """Counts and times, for Prometheus."""
        return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """The model, under each of its names."""
        if "anthropic-version" in request.headers:
            data = [describe_for_anthropic(service, name) for name in service.names]
            return respond({"data": data, "has_more": False, "first_id": service.name, "last_id": service.names[-1]})
        return respond({"object": "list", "data": [describe_model(service, name) for name in service.names]})

    @router.get("/v1/models/{name:path}")
    async def find_model(name: str, request: Request) -> Response:
        """One name of the model."""
        service.check_model(name)
        is_asked = "anthropic-version" in request.headers
        return respond((describe_for_anthropic if is_asked else describe_model)(service, name))

    return router


def describe_model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "saccade",
        "root": service.name,
        "parent": None,
        "max_model_len": service.longest,
    }


def describe_for_anthropic(service: Service, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(service.started, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created}


def show_error(path: str, error: ApiError) -> Response:
    body, headers = write_refusal(path, error)
    return Response(body, error.status_code, headers)


async def show_invalid(request: Request, error: Exception) -> Response:
    """The field that is wrong, by name, and how many more."""
    problems: Sequence[Any] = error.errors() if isinstance(error, RequestValidationError) else ()
    if not problems:
        return show_error(request.url.path, ApiError(400, "body", "body"))
    name, problem = choose_problem(getattr(error, "body", None), problems)
    text = f"{name}: {describe_problem(problem, list_body_fields(request))}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return show_error(request.url.path, ApiError(400, text + more, name))


def choose_problem(body: Any, problems: Sequence[Any]) -> tuple[str, Any]:
    """The problem that says most, of the first field that has one: where a type has alternatives, that of the one
    which comes closest, so the deepest; and what a thing is counts more than what it has beside."""
    first = problems[0]["loc"][1:2]
    named = [(name_problem(body, each), each) for each in problems if each["loc"][1:2] == first]

    def rate(found: tuple[str, Any]) -> tuple[int, int]:
        return -found[0].count("."), LAST.get(found[1]["type"], 0)

    return min(named, key=rate)


def list_body_fields(request: Request) -> list[str]:
    """The names of the fields that a request to this path has."""
    parameters = getattr(getattr(request.scope.get("route"), "dependant", None), "body_params", ())
    return [name for one in parameters for name in getattr(one.field_info.annotation, "model_fields", ())]


def describe_problem(problem: Any, known: Sequence[str]) -> str:
    """Like: Input should be a valid number, found 'hot'. `known`: the fields of the request, not what is inside."""
    text, kind, context = str(problem["msg"]), problem["type"], problem.get("ctx") or {}
    if kind == "extra_forbidden":
        near = find_near(str(problem["loc"][-1]), known) if len(problem["loc"]) == 2 else []
        return "there is no such field here" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if kind == "union_tag_invalid":
        return f"expected {KIND_TAG.sub('', context['expected_tags'])}, found {show(KIND_TAG.sub('', context['tag']))}"
    if kind in NO_OBJECT:
        text = "expected an object"
    return text if kind in ("missing", "whole") else f"{text}, found {show(problem.get('input'))}"


def name_problem(body: Any, problem: Any) -> str:
    """The field that a problem is about."""
    kind, place = problem["type"], problem["loc"][1:]
    if kind == "union_tag_invalid":  # one of several objects, by the value of a field
        tagged = KIND_TAG.match(problem["ctx"]["tag"])
        place = (*place, tagged[1] if tagged else problem["ctx"]["discriminator"].strip("'"))
    return name_field(body, place, kind in ("missing", "union_tag_invalid")) or "body"


def name_field(body: Any, place: Sequence[int | str], is_missing: bool) -> str:
    """The field at a `place` in the body, without the alternatives of a type that a validator names in between.
    `is_missing`: the last part of the place is a field that should be there."""
    names = list[str]()
    for i, part in enumerate(place):
        if isinstance(body, dict) and (part in body or (is_missing and i == len(place) - 1)):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        names.append(str(part))
    return ".".join(names)


async def show_refused(request: Request, error: Exception) -> Response:
    """An ApiError of ours, or the framework's own: no such path, no such method."""
    if isinstance(error, ApiError):
        return show_error(request.url.path, error)
    status, detail = getattr(error, "status_code", 500), str(getattr(error, "detail", error))
    told = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    headers = getattr(error, "headers", None)
    return show_error(request.url.path, ApiError(status, told.get(status, detail), headers=headers))


async def show_failed(request: Request, error: Exception) -> Response:
    """What our own code raises."""
    return show_error(request.url.path, judge(error))


async def show_bug(request: Request, error: Exception) -> Response:
    """A bug; its traceback is logged, and not told to clients."""
    if is_refusal(error):
        return show_error(request.url.path, ApiError(503, "the system refuses memory; try again with less"))
    return show_error(request.url.path, ApiError(500, f"a bug of the server: {type(error).__name__}; its log has more"))


class CountedRequests:
    """Counts requests by path and status. Paths that no route has are one, or anybody could fill the memory."""

    def __init__(self, app: App, service: Service, paths: Sequence[str]) -> None:
        self.app, self.requests, self.paths = app, service.metrics.requests, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def send_counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, send_counted)
