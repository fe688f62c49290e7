"""Answers of an engine as they come, and what APIs ask of one. Knows no process. Next: client.py."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from saccade.engine.params import SamplingParams
from saccade.errors import SaccadeError
from saccade.server.engine.wire import Delta, Load, Ready


class EngineDown(SaccadeError):
    """The engine has failed, or the server is ending: no answer will come. `status`: 500 for an answer that was begun,
    503 for one that may be had elsewhere."""

    def __init__(self, text: str, status: int = 503) -> None:
        super().__init__(text)
        self.status = status


class Answers:
    """The answers to the prompts of one HTTP request, as they come. An asynchronous iterator of (place, Delta); what
    came while nobody looked is one Delta."""

    def __init__(self, close: "Callable[[Answers], None]", count: int) -> None:
        self._close, self._open = close, set(range(count))
        self._pending: dict[int, Delta] = {}
        self._arrived = asyncio.Event()
        self._failure: Exception | None = None
        self.began = time.monotonic()

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        place = next(iter(self._pending))
        return place, self._pending.pop(place)

    def put(self, place: int, delta: Delta) -> None:
        before = self._pending.get(place)
        self._pending[place] = delta if before is None else join_deltas(before, delta)
        if delta.is_last:
            self._open.discard(place)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._arrived.set()

    def close(self) -> None:
        """Nobody reads any more: what runs is cancelled. Closing twice does nothing."""
        self._close(self)


def join_deltas(a: Delta, b: Delta) -> Delta:
    logprobs = None if a.logprobs is None and b.logprobs is None else [*(a.logprobs or ()), *(b.logprobs or ())]
    prompt = a.prompt_logprobs or b.prompt_logprobs
    return b._replace(tokens=a.tokens + b.tokens, text=a.text + b.text, logprobs=logprobs, prompt_logprobs=prompt)


class ServedEngine(Protocol):
    """What the APIs ask of an engine; tests have one with scripted answers."""

    ready: Ready
    load: Load

    @property
    def failure(self) -> str | None:
        """Why it answers no more; None while it does."""

    @property
    def unanswered(self) -> int:
        """Prompts that run or wait."""

    async def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]], capture: bool = False) -> Answers:
        """Queue prompts: all or none. `capture`: their answers tell where they looked. RequestError if one cannot be
        served, EngineDown if there is no engine."""
