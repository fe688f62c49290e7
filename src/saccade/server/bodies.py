"""Bodies of requests and of answers: strict JSON in, JSON or server-sent events out, and what a lost client means.

Knows no API. Next: app.py; apis/, whose routes are JsonRoutes.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.responses import StreamingResponse

from saccade.base.json_text import to_json
from saccade.base.printable import shorten
from saccade.base.strict_json import find_repeated
from saccade.errors import SaccadeError
from saccade.server.refusals import ApiError, judge, shape_error

T = TypeVar("T")
LARGE = 1 << 18  # bytes of a body that are parsed beside the event loop: 0.2 ms as one text, more as many values
MOST_OBJECTS, MOST_KEYS = 1 << 16, 1 << 13  # of a body, and of an object: agents with 2,000 messages send 20,000
# What a route answers, for its description: JSON, or events if the request asks for a stream.
EVENTS = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}}
WHOLE_OR_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": EVENTS}}
UNSEEN = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass events on at once


class JsonRequest(Request):
    """A request whose body is JSON and nothing else."""

    async def json(self) -> Any:
        if not hasattr(self, "_value"):
            raw = await self.body()
            self._value = await asyncio.to_thread(parse_body, raw) if len(raw) > LARGE else parse_body(raw)
            for name in self.app.state.ignored_fields:
                drop_field(self._value, name.split("."))
        return self._value


class JsonRoute(APIRoute):
    """A route that reads its body by JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json" and not kind.endswith("+json"):
                found = repr(kind[:100]) if kind else "none"
                raise ApiError(415, f"Content-Type: expected application/json, found {found}")
            coding = request.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("", "identity"):
                raise ApiError(415, f"Content-Encoding: expected none, found {coding[:100]!r}; send the body as it is")
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def parse_body(raw: bytes) -> Any:
    """The value of a body. ApiError 400, in one line, for what is no JSON: NaN, broken UTF-8, endless nesting."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=refuse_literal, object_pairs_hook=ObjectCheck())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is no JSON: byte {error.start:,} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error.msg} at character {error.pos:,}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ApiError(400, f"the body cannot be read: {str(error)[:200]}") from None
    except RecursionError:
        raise ApiError(400, "the body cannot be read: its lists and objects lie too deep in each other") from None


def drop_field(value: Any, names: Sequence[str]) -> None:
    """Take a field out of an object, or out of each object of a list. `names`: those that lead to it, and its own."""
    for each in value if isinstance(value, list) else (value,):
        if isinstance(each, dict) and len(names) == 1:
            each.pop(names[0], None)
        elif isinstance(each, dict):
            drop_field(each.get(names[0]), names[1:])


def refuse_literal(name: str) -> float:
    raise ApiError(400, f"the body is no JSON: {name} is no JSON number")


class ObjectCheck:
    """Makes the objects of one body. Each key must stand once in its object: of two values, one would be passed over in
    silence. There is an end to objects and to their keys: each costs some 10 us to judge, a wrong one more."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count += 1
        if self._count > MOST_OBJECTS:
            raise ApiError(400, f"the body has more than {MOST_OBJECTS:,} objects")
        if len(pairs) > MOST_KEYS:
            raise ApiError(400, f"an object of the body has {len(pairs):,} keys; expected {MOST_KEYS:,} at most")
        if repeated := find_repeated(pairs):
            name = shorten(repeated[0], 100)
            raise ApiError(400, f"{name}: the key stands twice in one object of the body", name)
        return dict(pairs)


def respond(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def write_event(value: Any, name: str | None = None) -> str:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {to_json(value)}\n\n"


def stream(events: AsyncIterator[str]) -> StreamingResponse:
    """Events as they come. A client that goes away ends the iterator, whose `finally` cancels the request."""
    return StreamingResponse(events, media_type="text/event-stream", headers=UNSEEN)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. If the client goes away meanwhile, work is cancelled, and nobody hears of it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def write_error(error: ApiError) -> str:
    """As OpenAI's clients expect it."""
    return write_event(shape_error("", error.status_code, error.message, error.param, error.code))


async def guarded(
    events: AsyncIterator[str], end: str = "", write: Callable[[ApiError], str] = write_error
) -> AsyncIterator[str]:
    """`events`, then `end`. What they raise becomes a last event, by `write`."""
    try:
        async for event in events:
            yield event
    except SaccadeError as error:
        yield write(judge(error))
    except Exception as error:  # a bug: the client is told, the log gets the traceback
        logging.getLogger("saccade").exception("a stream broke")
        yield write(ApiError(500, f"a bug of the server: {type(error).__name__}"))
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    if end:
        yield end
