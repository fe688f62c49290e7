"""Connections: as many as there are descriptors for, with headers in time, and broken requests told as the API would.

uvicorn waits forever for the rest of a header, and without a descriptor left asyncio writes a traceback for each
connection that waits, 15 MB a second. Knows no request. Next: run.py, which serves with it.
"""

import asyncio
import errno
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from saccade.base.json_text import to_json
from saccade.server.refusals import shape_error

LAST_READ = 1.0  # seconds in which a client may read why its connection ends
ACCEPTED_AT_ONCE = 16  # connections, before any of them is counted
OWN_DESCRIPTORS = 48  # files and sockets of the server itself
MOST_DESCRIPTORS = 1 << 16
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def count_descriptors() -> int:
    """Connections that there are descriptors for; the limit of this process is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    soft = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(1, soft - OWN_DESCRIPTORS - ACCEPTED_AT_ONCE)


def tell_exhaustion(say: Callable[[str], None]) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """A handler of an event loop's errors: connections that cannot be accepted are one line in ten seconds."""
    told = [float("-inf")]

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in EXHAUSTED):
            loop.default_exception_handler(context)
        elif loop.time() - told[0] > 10:
            told[0] = loop.time()
            say(f"connections cannot be accepted: {error.strerror}; raise the limit of open files (LimitNOFILE)")

    return handle


def make_protocol(header_timeout: float, most: int = MOST_DESCRIPTORS) -> type[H11Protocol]:
    """uvicorn's protocol, with `header_timeout` seconds from the first byte of a request, or from the beginning of its
    connection, to the last byte of its headers. Beyond `most` connections, each further one is refused."""

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _is_over = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # asyncio does so only for sockets that name their protocol, which those of a listener do not. Else a body
            # waits for the acknowledgement of its headers: 42 ms of each answer on a kept connection.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self.connections) > most:
                self._end(503, f"the server has {most:,} connections already; try again later")
            else:
                self._arm()

        def data_received(self, data: bytes) -> None:
            if self._is_over:
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()
            else:  # a part of a header, or the rest of a body that nobody wants
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._disarm()  # from here on the keep-alive timer counts

        def send_400_response(self, msg: str) -> None:
            error = sys.exc_info()[1]  # uvicorn calls this where it catches h11's error
            if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
                self._end(431, "the headers of the request are too long")
            else:
                self._end(400, f"the request is no HTTP: {error or msg}")

        def _arm(self) -> None:
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(header_timeout, self._give_up)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            self._end(408, f"the headers of a request did not come within {header_timeout:g} seconds")

        def shutdown(self) -> None:
            if self._is_over:
                self.transport.close()
            else:
                super().shutdown()

        def _end(self, status: int, text: str) -> None:
            """Say why, and end the connection; a moment later, or what the client still sends would reset it, and take
            the answer with it."""
            if self.transport.is_closing() or self._is_over:
                return
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):
                self.transport.close()  # in the middle of an answer
                return
            self._is_over = True
            self._disarm()
            self._unset_keepalive_if_required()
            self.transport.write(write_response(status, shape_error("", status, text)))
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(LAST_READ, self.transport.close)

    return TimedProtocol


def write_response(status: int, body: Any) -> bytes:
    """A whole response, after which the connection ends."""
    data = to_json(body).encode()
    reason = {
        400: "Bad Request",
        408: "Request Timeout",
        431: "Request Header Fields Too Large",
        503: "Service Unavailable",
    }.get(status, "Error")
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    head += "retry-after: 10\r\n" if status == 503 else ""
    return head.encode() + b"connection: close\r\n\r\n" + data
