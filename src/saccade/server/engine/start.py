"""Starts the process of an engine, waits until it has loaded its model, and ends it. Next: process.py, what it does."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from saccade.errors import SaccadeError
from saccade.server.engine.wire import LoadProgress, Note, Ready, Refused, pack, receive

BUFFER = 1 << 20  # of the socket: a step's pieces fit whatever the event loop is doing


class StartRefused(SaccadeError):
    """The engine process could not start; `code` is the exit code that says why."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def start_engine(options: dict[str, Any]) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """The process that will load a model, and our end of its socket. `options` are those of `prepare` (api/loading)."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    number = str(theirs.fileno())
    line = [sys.executable, "-m", "saccade.server.engine.process", number, str(os.getpid())]
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
