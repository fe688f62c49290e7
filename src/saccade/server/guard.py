"""What every request must pass before an API sees it: the key, the size of its body, the time it takes to come.

A plain ASGI middleware: it does not buffer answers. Knows no JSON. Next: app.py, which puts it in front.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from saccade.base.json_text import to_json
from saccade.server.refusals import ApiError, shape_error
from saccade.server.settings import ServeSettings

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

UNGUARDED = ("/", "/health", "/metrics")  # probes and scrapers have no key; the page asks for one
CLOSE = {"connection": "close"}


class Guard:
    """Lets through whoever has a key, with bodies that are not too long and come in time."""

    def __init__(self, app: App, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key: value for key, value in scope["headers"]}
        refusal = self._judge(scope["path"], headers)
        if refusal is not None:
            await send_error(send, scope["path"], refusal)
            return
        await self.app(scope, self._limit(receive), send)

    def _judge(self, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        if self._keys and path not in UNGUARDED and not is_known(find_key(headers), self._keys):
            text = "expected an API key of this server, as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
            return ApiError(401, text, code="invalid_api_key", headers={"www-authenticate": "Bearer", **CLOSE})
        length = headers.get(b"content-length", b"")
        return self._too_long() if length.isdigit() and int(length) > self.settings.max_body else None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.settings.max_body:,} bytes", headers=CLOSE)

    def _limit(self, receive: Receive) -> Receive:
        """`receive`, which raises an ApiError once the body is too long or too slow."""
        loop = asyncio.get_running_loop()
        end, size, is_whole = loop.time() + self.settings.body_timeout, 0, False

        async def receive_limited() -> Any:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                text = f"the body did not come within {self.settings.body_timeout:g} seconds"
                raise ApiError(408, text, headers=CLOSE) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if size > self.settings.max_body:
                    raise self._too_long()
            return message

        return receive_limited


def find_key(headers: Mapping[bytes, bytes]) -> bytes:
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def is_known(key: bytes, keys: Sequence[bytes]) -> bool:
    """Compares with all, in a time that tells nothing of where they differ."""
    return any([hmac.compare_digest(key, known) for known in keys])


async def send_error(send: Send, path: str, error: ApiError) -> None:
    body = to_json(shape_error(path, error.status_code, error.message, error.param, error.code)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(error.headers or {})}
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})
