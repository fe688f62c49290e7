"""The engine as the HTTP process sees it: prompts go out, pieces of answers come in.

Starts the engine process and notices when it ends or hangs. Then every open answer ends with an EngineDown, and no new
one is taken. Everything here runs on the event loop and none of it waits for a step. Next: engine_process.py, the other
end; app.py, which asks.
"""

import asyncio
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from saccade.engine.params import SamplingParams
from saccade.errors import RequestError, SaccadeError
from saccade.server.wire import (
    LENGTH,
    Cancel,
    Delta,
    Failed,
    Load,
    LoadProgress,
    Note,
    Ping,
    Pong,
    Ready,
    Refused,
    Stepped,
    Submit,
    Taken,
    pack,
    receive,
)

PING_PERIOD = 5.0
SILENCE = 60.0  # without an answer to a ping: the process is stopped, or the machine swaps
BUFFER = 1 << 20  # of the socket: a step's pieces fit whatever the event loop is doing


class EngineDown(SaccadeError):
    """The engine has failed, or the server is ending: no answer will come. `status`: 500 for an answer that was begun,
    503 for one that may be had elsewhere."""

    def __init__(self, text: str, status: int = 503) -> None:
        super().__init__(text)
        self.status = status


class StartRefused(SaccadeError):
    """The engine process could not start; `code` is the exit code that says why."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


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
            await asyncio.sleep(PING_PERIOD)
            silence = time.monotonic() - self._heard
            if silence > SILENCE:
                self._give_up(f"the engine process has not answered for {silence:.0f} seconds")

    def _give_up(self, text: str) -> None:
        self.fail(text)
        with suppress(ProcessLookupError):
            self.process.kill()


def start_engine(options: dict[str, Any]) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """The process that will load a model, and our end of its socket. `options` are those of api.prepare's `prepare`."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    number = str(theirs.fileno())
    line = [sys.executable, "-m", "saccade.server.engine_process", number, str(os.getpid())]
    # A session of its own: Ctrl-C in the terminal is for the server, which ends answers in order first.
    process = subprocess.Popen(line, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    with suppress(OSError):  # an end that came at once is told by the first receive
        ours.sendall(pack(options))
    return process, ours


def wait_until_ready(
    process: "subprocess.Popen[bytes]", link: socket.socket, say: Callable[[str], None], watch: Callable[..., None]
) -> Ready:
    """What the engine says when it has loaded its model. `say` hears notes, `watch` how far it is (verb, bytes done,
    bytes in all). StartRefused if it cannot."""
    try:
        while True:
            message = receive(link)
            if isinstance(message, Ready):
                return message
            if isinstance(message, Refused):
                raise StartRefused(message.text, message.code)
            if isinstance(message, Note):
                say(message.text)
            elif isinstance(message, LoadProgress):
                watch(message.verb, message.done, message.total)
    except EOFError:
        code = process.wait(10)
        told = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        cure = ": the system may have too little memory for it" if code == -signal.SIGKILL else ""
        raise StartRefused(f"the engine process ended {told} while it loaded the model{cure}", 70) from None


def end_process(process: "subprocess.Popen[bytes]", patience: float = 5.0) -> None:
    """Wait for the end of a process whose socket is closed; kill it after that time."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
