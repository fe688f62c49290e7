"""Connections that must send their headers in time, and hear of a broken request in the shape of the API.

uvicorn waits forever for the rest of a header; a few hundred such connections would take all its descriptors. Knows no
request. Next: run.py, which serves with it.
"""

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from saccade.base.json_text import to_json
from saccade.server.refusals import shape_error

LAST_READ = 1.0  # seconds in which a client may read why its connection ends


def make_protocol(header_timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, with `header_timeout` seconds from the first byte of a request, or from the beginning of its
    connection, to the last byte of its headers."""

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _is_over = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
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
    reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}.get(status, "Error")
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + data
