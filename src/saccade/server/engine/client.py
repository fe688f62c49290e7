"""The engine as the HTTP process sees it: prompts go out, pieces of answers come in.

Notices when the engine's process ends or hangs. Then every open answer ends with an EngineDown, and no new one is
taken. Everything here runs on the event loop and none of it waits for a step. Next: answers.py, what comes in;
start.py, which starts the process; loop.py, the other end.
"""

import asyncio
import itertools
import pickle
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from saccade.engine.params import SamplingParams
from saccade.errors import RequestError, SaccadeError
from saccade.server.engine.answers import Answers, EngineDown
from saccade.server.engine.start import end_process
from saccade.server.engine.wire import LENGTH, Cancel, Failed, Load, Ping, Pong, Ready, Stepped, Submit, Taken, pack

PING_PERIOD = 5.0
SILENCE = 60.0  # without an answer to a ping: the process is stopped, or the machine swaps


class EngineClient:
    """An engine in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", link: socket.socket, ready: Ready, timeout: float) -> None:
        self.process, self.ready, self.load = process, ready, Load()
        self.failed = asyncio.Event()
        self._link, self._timeout = link, timeout
        self._failure: str | None = None
        self._ids = itertools.count()
        self._places: dict[int, tuple[Answers, int]] = {}  # of prompts that have no whole answer
        self._taken: dict[int, asyncio.Future[None]] = {}
        self._heard = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def unanswered(self) -> int:
        return len(self._places)

    async def connect(self) -> None:
        """Begin to listen to the process."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._link)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]

    async def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]], capture: bool = False) -> Answers:
        self._require_life()
        answers = Answers(self._close, len(prompts))
        ids = [next(self._ids) for _ in prompts]
        loop = asyncio.get_running_loop()
        futures = {id: loop.create_future() for id in ids}
        for place, (id, (tokens, params)) in enumerate(zip(ids, prompts, strict=True)):
            self._places[id] = (answers, place)
            self._taken[id] = futures[id]
            self._send(Submit(id, tokens, params, capture))
        try:
            refusals = await asyncio.gather(*futures.values(), return_exceptions=True)
            told = [error for error in refusals if isinstance(error, BaseException)]
            if told:
                raise told[0]
        except BaseException:
            answers.close()
            raise
        return answers

    def fail(self, text: str, status: int = 500) -> None:
        """Every open answer ends with this, and no new one begins. The first reason stays."""
        if self._failure is not None:
            return
        self._failure = text
        for future in self._taken.values():
            if not future.done():
                future.set_exception(EngineDown(text, status))
        for answers in {id(answers): answers for answers, _ in self._places.values()}.values():
            answers.fail(EngineDown(text, status))
        self._taken.clear()
        self._places.clear()
        self.failed.set()

    async def stop(self) -> None:
        """End the process, and wait for its end."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()  # which ends it, once the event loop goes on
        await asyncio.to_thread(end_process, self.process)

    def _require_life(self) -> None:
        if self._failure is not None:
            raise EngineDown(self._failure)

    def _send(self, message: Any) -> None:
        with suppress(OSError, RuntimeError):  # its end is told to everybody by _listen
            self._writer.write(pack(message))

    def _close(self, answers: Answers) -> None:
        ids = tuple(id for id, (owner, _) in self._places.items() if owner is answers)
        for id in ids:
            del self._places[id]
            future = self._taken.pop(id, None)
            if future is not None:
                future.cancel()
        if ids and self._failure is None:
            self._send(Cancel(ids))

    async def _listen(self) -> None:
        try:
            while True:
                (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                message = pickle.loads(await self._reader.readexactly(size))
                self._heard = time.monotonic()
                self._take(message)
        except (asyncio.IncompleteReadError, OSError):
            await asyncio.sleep(0)
            self.fail(f"the engine process has ended{await self._find_end()}")

    async def _find_end(self) -> str:
        for _ in range(20):
            if (code := self.process.poll()) is not None:
                return f" by signal {signal.Signals(-code).name}" if code < 0 else f" with code {code}"
            await asyncio.sleep(0.05)
        return ""

    def _take(self, message: Any) -> None:
        if isinstance(message, Stepped):
            self.load = message.load
            for id, delta in message.deltas:
                found = self._places.get(id)
                if found is not None:
                    found[0].put(found[1], delta)
                    if delta.is_last:
                        del self._places[id]
        elif isinstance(message, Taken):
            future = self._taken.pop(message.id, None)
            if future is not None and not future.done():
                if message.refusal is None:
                    future.set_result(None)
                else:
                    self._places.pop(message.id, None)
                    kind = SaccadeError if message.is_bug else RequestError
                    future.set_exception(kind(message.refusal))
        elif isinstance(message, Pong) and message.busy > self._timeout:
            self._give_up(f"the engine has not ended its step for {message.busy:.0f} seconds")
        elif isinstance(message, Failed):
            self.fail(f"the engine has failed: {message.text}")

    async def _watch(self) -> None:
        while True:
            self._send(Ping())
            began = time.monotonic()
            await asyncio.sleep(PING_PERIOD)
            now = time.monotonic()
            if now - began > 2 * PING_PERIOD:  # it was this process that did not listen: what came lies in the socket
                self._heard = now
            silence = now - self._heard
            if silence > SILENCE:
                self._give_up(f"the engine process has not answered for {silence:.0f} seconds")

    def _give_up(self, text: str) -> None:
        self.fail(text)
        with suppress(ProcessLookupError):
            self.process.kill()
