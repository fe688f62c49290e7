"""Messages between rank 0 and one other rank, over a connected socket.

A message is a small JSON object and, where tensors travel, raw bytes behind it. Nothing that comes from a socket is
ever executed: JSON and bytes, no pickle. One thread may read, any may send. Knows no ranks. Next: lead.py, follow.py,
the two ends.
"""

import json
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple

MESSAGE_SIZES = struct.Struct("<IQ")  # bytes of the JSON, then bytes behind it
MOST_HEAD = 1 << 28  # a head beyond this is no message of ours


class RankMessage(NamedTuple):
    head: dict[str, Any]
    payload: bytes = b""


class LinkClosed(Exception):
    """The other end is gone."""


def pack_message(head: Mapping[str, Any], payload_size: int = 0) -> bytes:
    """A message's bytes up to its payload."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return MESSAGE_SIZES.pack(len(text), payload_size) + text


class RankLink:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._sending = Lock()
        self._came = bytearray()
        sock.setblocking(True)
        if sock.family != socket.AF_UNIX:  # small messages leave at once
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, packed: bytes, payload: bytes | memoryview = b"") -> None:
        """A message of `pack_message`, and its payload. Raises LinkClosed. Waits while the other end does not read."""
        try:
            with self._sending:
                self.socket.sendall(packed)
                if payload:
                    self.socket.sendall(payload)
        except OSError as error:
            raise LinkClosed(str(error)) from None

    def receive(self) -> RankMessage:
        """The next message. Waits for it; raises LinkClosed."""
        while (message := self._cut()) is None:
            self._read(0)
        return message

    def take_all(self) -> list[RankMessage]:
        """The messages that have come whole, without waiting. Raises LinkClosed if there is none and never will be."""
        with suppress(BlockingIOError):
            while True:
                try:
                    self._read(socket.MSG_DONTWAIT)
                except LinkClosed:
                    found = self._cut_all()
                    if not found:
                        raise
                    return found
        return self._cut_all()

    def _cut_all(self) -> list[RankMessage]:
        found = list[RankMessage]()
        while (message := self._cut()) is not None:
            found.append(message)
        return found

    def _read(self, flags: int) -> None:
        try:
            data = self.socket.recv(1 << 18, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise LinkClosed(str(error)) from None
        if not data:
            raise LinkClosed("the other end closed it")
        self._came += data

    def _cut(self) -> RankMessage | None:
        """The first message of what came, if it is whole."""
        if len(self._came) < MESSAGE_SIZES.size:
            return None
        head, behind = MESSAGE_SIZES.unpack_from(self._came)
        if head > MOST_HEAD:
            raise LinkClosed("what came is no message")
        end = MESSAGE_SIZES.size + head + behind
        if len(self._came) < end:
            return None
        text = bytes(self._came[MESSAGE_SIZES.size : MESSAGE_SIZES.size + head])
        payload = bytes(self._came[MESSAGE_SIZES.size + head : end])
        del self._came[:end]
        try:
            return RankMessage(json.loads(text), payload)
        except ValueError:
            raise LinkClosed("what came is no message") from None

    def close(self) -> None:
        """Also wakes a thread that sends or receives."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
