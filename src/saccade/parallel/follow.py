"""The side of every other rank: it does what rank 0 says, tells when it fails, and ends with rank 0.

A thread of its own says every second how far this rank is, and ends the process as soon as rank 0 is gone: a closed
link, or another parent. So no rank is left behind. Knows no models. Next: lead.py, rank 0's side.
"""

import os
import select
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from signal import SIGKILL
from typing import Any

from saccade.parallel.lead import describe_error
from saccade.parallel.link import LinkClosed, RankLink, RankMessage, pack_message
from saccade.parallel.processes import STOPPED, read_state
from saccade.parallel.progress import Tracker

LOOK_SECONDS = 0.25  # seconds between two looks at rank 0
WORD_SECONDS = 1.0  # seconds between two words to it
LOST_CONNECTIONS = (
    "gloo",
    "nccl",
    "connection",
    "socket",
    "broken pipe",
    "store",
)  # what errors of a broken connection speak of


class Follow:
    """This rank and its link to rank 0."""

    def __init__(self, link: RankLink, parent: int | None = None) -> None:
        """`parent`: the process that started this one, if that is rank 0."""
        self.link, self.tracker = link, Tracker()
        self._parent, self._is_leaving = parent, False
        self._neighbours: list[tuple[int, int]] = []  # rank and process of those that rank 0 cannot see
        threading.Thread(target=self._run, name="saccade-follow", daemon=True).start()

    def receive(self) -> RankMessage:
        """The next of rank 0's messages. Raises LinkClosed."""
        return self.link.receive()

    def reply(self, head: Mapping[str, Any]) -> None:
        self.link.send(pack_message(head))

    def look_after(self, neighbours: list[tuple[int, int]]) -> None:
        """Tell rank 0 if one of these processes of this machine is stopped."""
        self._neighbours = neighbours

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this rank cannot go on."""
        with suppress(LinkClosed):
            self.reply({"failed": describe_error(error), "is_lost": is_lost(error)})

    def leave(self) -> None:
        """Tell rank 0 that this rank ends in order."""
        self._is_leaving = True
        with suppress(LinkClosed):
            self.reply({"left": True})

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.link.socket, select.POLLRDHUP)
        spoke, told = 0.0, False
        while True:
            gone = poll.poll(1e3 * LOOK_SECONDS)
            if gone or (self._parent is not None and os.getppid() != self._parent):
                self._end()
            for rank, pid in self._neighbours:
                if not told and read_state(pid) in tuple(STOPPED):
                    told = True
                    self._send({"stopped": rank})
                    with suppress(OSError):
                        os.kill(pid, SIGKILL)  # all end, and it could not
            now = time.monotonic()
            if now - spoke >= WORD_SECONDS:
                spoke = now
                self._send({"progress": self.tracker.read()})

    def _send(self, head: Mapping[str, Any]) -> None:
        try:
            self.link.send(pack_message(head))
        except LinkClosed:
            self._end()

    def _end(self) -> None:
        """At once, whatever this rank waits for; unless it ends in order just now."""
        if self._is_leaving:
            time.sleep(WORD_SECONDS)
        os._exit(1)


def is_lost(error: BaseException) -> bool:
    """Whether an error may only follow from the end of another rank."""
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return isinstance(error, LinkClosed | RuntimeError) and any(word in text for word in LOST_CONNECTIONS)
