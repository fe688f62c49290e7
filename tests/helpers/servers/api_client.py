"""Requests to the application in this process, in front of an engine whose answers are written."""

import asyncio
from typing import Any

import httpx
from scripted_engine import ScriptedEngine, make_service, say_text

from saccade.server.app import make_app
from saccade.server.settings import ServeSettings


class Client:
    """The application in this process, before a scripted engine."""

    def __init__(
        self, text: str = "Hi there.", size: int = 3, reason: str = "stop", chat: Any = None, **settings: Any
    ) -> None:
        self.engine = ScriptedEngine(lambda tokens, params: say_text(text, size, reason))
        service = make_service(self.engine, ServeSettings(**settings), chat)
        self.app, self.metrics = make_app(service), service.metrics

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        kind = {"json": body} if not isinstance(body, bytes) else {"content": body}
        return self.send("POST", path, **kind, **more)

    def send(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://saccade") as client:
                return await client.request(method, path, **more)

        return asyncio.run(run())

    @property
    def prompt(self) -> str:
        """The last prompt, as text."""
        service = make_service(self.engine)
        return b"".join(service.spell(token) for token in self.engine.prompts[-1]).decode()
