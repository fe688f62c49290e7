"""What every request must pass before an API sees it: the key, the size of its body, the time it takes to come.

A server that is ending lets through nothing but questions about its state. A plain ASGI middleware: it does not buffer
answers. Knows no JSON. Next: app.py, which puts it in front.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from saccade.server.refusals import ApiError, write_refusal
from saccade.server.settings import ServeSettings

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

STATE = ("/health", "/metrics")
UNGUARDED = ("/", *STATE)  # probes and scrapers have no key; the page asks for one
CLOSE = {"connection": "close"}
BODY_PAUSE = 5.0  # seconds without a byte


class Guard:
    """Lets through whoever has a key, with bodies that are not too long and come in time, until the server ends."""

    def __init__(self, app: App, settings: ServeSettings, is_ending: Callable[[], bool]) -> None:
        self.app, self.settings, self.is_ending = app, settings, is_ending
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # answered as GET; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        headers = {key: value for key, value in scope["headers"]}
        body = LimitedBody(receive, self.settings, waits=headers.get(b"expect", b"").lower() == b"100-continue")
        send = body.take_before_the_end_of(send)
        refusal = self._judge(scope["path"], headers)
        if refusal is not None:
            await send_error(send, scope["path"], refusal)
            return
        await self.app(scope, body.receive, send)

    def _judge(self, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        if self._keys and path not in UNGUARDED and not is_known(find_key(headers), self._keys):
            text = "expected an API key of this server, as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
            return ApiError(401, text, code="invalid_api_key", headers={"www-authenticate": "Bearer", **CLOSE})
        if self.is_ending() and path not in STATE:
            return make_ending()
        length = headers.get(b"content-length", b"")
        is_long = length.isdigit() and int(length) > self.settings.max_body
        return make_too_long(self.settings.max_body) if is_long else None


class LimitedBody:
    """The body of a request as it comes; an ApiError once it is too long or too slow.

    A connection that closes while a client still sends is reset, and with it goes the answer that the client has not
    read. So what is left of a body is taken, and forgotten, before the end of an answer that closes: at most until its
    time is over, or nothing comes for BODY_PAUSE seconds.
    """

    def __init__(self, receive: Receive, settings: ServeSettings, waits: bool) -> None:
        """`waits`: the client sends nothing before it is asked to."""
        self._receive, self._settings, self._waits = receive, settings, waits
        self._end = asyncio.get_running_loop().time() + settings.body_timeout
        self._size, self._is_whole = 0, False

    async def receive(self) -> Any:
        if self._is_whole:
            return await self._receive()
        self._waits = False
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not come within {self._settings.body_timeout:g} seconds"
            raise ApiError(408, text, headers=CLOSE) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._size > self._settings.max_body:
                raise make_too_long(self._settings.max_body)
        return message

    def take_before_the_end_of(self, send: Send) -> Send:
        async def send_then_take(message: Any) -> None:
            is_end = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not is_end or self._is_whole or self._waits:
                await send(message)
                return
            await send({**message, "more_body": True})  # all that the client waits for
            await self._take_rest()
            await send({"type": "http.response.body", "body": b""})

        return send_then_take

    async def _take_rest(self) -> None:
        now = asyncio.get_running_loop().time
        try:
            while not self._is_whole:
                async with asyncio.timeout_at(min(self._end, now() + BODY_PAUSE)):
                    message = await self._receive()
                self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass


def make_too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit:,} bytes", headers=CLOSE)


def make_ending() -> ApiError:
    """The error of a request that comes too late; another server may have started in 10 seconds."""
    return ApiError(503, "the server is ending", headers={"retry-after": "10", **CLOSE})


def find_key(headers: Mapping[bytes, bytes]) -> bytes:
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def is_known(key: bytes, keys: Sequence[bytes]) -> bool:
    """Compares with all, in a time that tells nothing of where they differ."""
    return any([hmac.compare_digest(key, known) for known in keys])


async def send_error(send: Send, path: str, error: ApiError) -> None:
    body, headers = write_refusal(path, error)
    headers["content-length"] = str(len(body))
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})
