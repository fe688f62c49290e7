"""Runs a server: the socket, the engine process, uvicorn, signals, and the exit code.

TERM and Ctrl-C let running answers finish for a grace time. If the engine fails, the server answers with errors for a
moment, so that probes see it, and ends with code 1, so that whatever supervises it starts it again. Next: app.py.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from saccade.api.loading.side_files import read_side_files
from saccade.base.printable import escape
from saccade.base.values import show_count
from saccade.chat.find import find_chat_format, open_template
from saccade.chat.template import TemplateFormat
from saccade.chat.types import ChatFormat
from saccade.errors import ConfigError
from saccade.server.app import make_app
from saccade.server.connections import ACCEPTED_AT_ONCE, count_descriptors, make_protocol, tell_exhaustion
from saccade.server.engine.client import EngineClient
from saccade.server.engine.start import start_engine, wait_until_ready
from saccade.server.engine.wire import Ready
from saccade.server.service import Service
from saccade.server.settings import ServeSettings

BUNDLED = "saccade-bundled"  # the name of the model that comes with the package
ENGINE_FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT
LAST_WORDS = 2.0  # seconds that clients have to take the end of an answer that was cut
SOCKET_BACKLOG = 2048  # connections that are not accepted yet
ENDING_PERIOD = 0.05  # seconds


def run_server(
    options: dict[str, Any], settings: ServeSettings, say: Callable[[str], None], watch: Callable[..., None]
) -> int:
    """Serve the model of `options`, those of `prepare` (api/loading), until a signal or a failure; the exit code.
    `say` hears lines for people, `watch` how far the weights are."""
    if settings.chat_template is not None:
        open_template(settings.chat_template)  # a broken one is told before a model is loaded
    with bind(settings.host, settings.port) as listener:
        process, link = start_engine(options)
        try:
            ready = wait_until_ready(process, link, say, watch)
            say(ready.loaded)
            return asyncio.run(run(process, link, ready, options, settings, listener, say))
        finally:
            link.close()
            if process.poll() is None:
                process.kill()
            process.wait()


async def run(
    process: Any,
    link: socket.socket,
    ready: Ready,
    options: dict[str, Any],
    settings: ServeSettings,
    listener: socket.socket,
    say: Callable[[str], None],
) -> int:
    engine = EngineClient(process, link, ready, settings.engine_timeout)
    await engine.connect()
    side = read_side_files(ready.path, ready.config.eos_token_ids, ready.config.vocab_size)
    names = settings.names or (str(options.get("path") or BUNDLED),)
    chat = find_chat(ready, settings)
    if isinstance(chat, str):
        say(f"note: chats are not served: {chat}")
    service = Service(engine, side.tokenizer, side.obstacle, chat, names, settings)
    config = uvicorn.Config(
        make_app(service),
        http=make_protocol(settings.header_timeout, count_descriptors()),
        ws="none",
        lifespan="off",
        log_level=logging.ERROR,  # what clients do wrong is told to them
        access_log=False,
        timeout_keep_alive=max(1, int(settings.keep_alive)),
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
    )
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = QuietServer(config, lambda: say(f"serving {escape(service.name)} at {where}"))
    ending = Ending(server, service, engine, settings, say)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(tell_exhaustion(say))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.begin, number)
    tasks = [asyncio.create_task(ending.watch_engine())]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in (*tasks, *ending.tasks):
            task.cancel()
        await engine.stop()
    return ending.code


def find_chat(ready: Ready, settings: ServeSettings) -> ChatFormat | str:
    """How the model writes chats, or why it cannot. ConfigError for a template that the user named."""
    try:
        found = find_chat_format(ready.path, ready.config.model_type, settings.chat_template)
        if isinstance(found, TemplateFormat):
            found.check()
        return found
    except ConfigError as error:
        if settings.chat_template is not None:
            raise
        return str(error)


class QuietServer(uvicorn.Server):
    """uvicorn's server without its own signal handlers, which kill the process with the signal at the end. `tell` is
    called when it can be reached."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():  # asyncio takes one number for what waits and for what it accepts at once
            each.listen(SOCKET_BACKLOG)
        self._tell()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Ending:
    """How the server comes to its end, and with which code."""

    def __init__(
        self,
        server: uvicorn.Server,
        service: Service,
        engine: EngineClient,
        settings: ServeSettings,
        say: Callable[[str], None],
    ) -> None:
        self.server, self.service, self.engine, self.settings, self.say = server, service, engine, settings, say
        self.code = 0
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self, number: int) -> None:
        """A signal has come: take no more requests, let running ones finish. The second one cuts them."""
        self.code = INTERRUPTED if number == signal.SIGINT else self.code
        loop = asyncio.get_running_loop()
        if self.service.is_ending:
            self.engine.fail("the server was told twice to end, and the answer was cut", 503)
            loop.call_later(LAST_WORDS, setattr, self.server, "force_exit", True)
            return
        self.service.is_ending = True
        self.say(describe_ending(self.engine.unanswered, self.settings.grace))
        self.tasks.append(asyncio.create_task(self._finish(loop.time() + self.settings.grace)))

    async def _finish(self, end: float) -> None:
        """Stay open, so that probes hear of it, while answers run; cut at `end` those that still do."""
        now = asyncio.get_running_loop().time
        while self.engine.unanswered and now() < end:
            await asyncio.sleep(ENDING_PERIOD)
        self.engine.fail("the server is ending and the answer was cut", 503)
        # Clients have what is left of the time to read the end of their answers.
        self.server.config.timeout_graceful_shutdown = max(1, round(end - now() + LAST_WORDS))
        self.server.should_exit = True

    async def watch_engine(self) -> None:
        await self.engine.failed.wait()
        if self.service.is_ending:
            return
        self.say(
            f"{self.engine.failure}; the server answers with errors and ends in {self.settings.red_time:g} seconds"
        )
        self.code = ENGINE_FAILED
        await asyncio.sleep(self.settings.red_time)
        self.server.should_exit = True


def describe_ending(unanswered: int, grace: float) -> str:
    if not unanswered:
        return "ending: no answer is open"
    return f"ending: {show_count(unanswered, 'open answer')}, {grace:g} seconds to finish"


@contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on the address, not yet open: a port that is taken is told before a model is loaded."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(found[0], found[1])
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host {escape(host)}: no address of this machine: {getattr(error, 'strerror', error)}"
        ) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(found[4])
        except OSError as error:
            cure = "; name another --port, or 0 for any free one" if port else ""
            raise ConfigError(f"cannot serve at {escape(host)} port {port}: {error.strerror}{cure}") from None
        yield listener
