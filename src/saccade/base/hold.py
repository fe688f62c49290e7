"""Hold Ctrl-C back while a block runs that other threads rely on.

Python raises KeyboardInterrupt in the main thread, between any two of its instructions. Inside such a block that could
lose what another thread waits for. So the interrupt is kept until the block has ended. Knows no engine. Next:
engine/turns.py.
"""

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any


class Hold:
    """As a context manager: interrupts wait until the block has ended, but for what is `opened` inside. Blocks may lie
    in each other. In threads other than the main one, which are not interrupted, it does nothing."""

    def __init__(self) -> None:
        self._depth = 0  # of blocks; these fields are the main thread's alone
        self._is_open = False
        self._came: int | None = None  # the signal that waits
        self._previous: Callable[[int, FrameType | None], Any] | None = None  # None: no handler in Python

    def __enter__(self) -> None:
        if not is_main():
            return
        self._depth += 1
        if self._depth > 1:
            return
        try:
            found = signal.getsignal(signal.SIGINT)
            if found != self._take:
                self._previous = found if callable(found) else None
            if self._previous is not None:
                signal.signal(signal.SIGINT, self._take)  # from here on nothing is raised
        except BaseException:
            self._depth -= 1
            raise

    def __exit__(self, *_: object) -> None:
        if not is_main():
            return
        self._depth -= 1
        if self._depth == 0 and self._previous is not None:
            self._is_open = False
            if signal.getsignal(signal.SIGINT) == self._take:  # else a handler set another one: it stays
                signal.signal(signal.SIGINT, self._previous)
            self._deliver()

    def opened(self) -> AbstractContextManager[None]:
        """A block in a held one that may be interrupted: what takes long and is done again if it does not end."""
        return _Opened(self)

    def open(self) -> None:
        if is_main() and self._depth:
            self._deliver()
            self._is_open = True  # last: an interrupt before it leaves the window closed

    def close(self) -> None:
        if is_main():
            self._is_open = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        """The handler meanwhile."""
        if not self._is_open:
            self._came = number
        elif self._previous is not None:
            self._is_open = False  # the handler raises: the block is left, and what follows is held again
            self._previous(number, frame)
            self._is_open = True

    def _deliver(self) -> None:
        number, self._came = self._came, None
        if number is not None and self._previous is not None:
            self._previous(number, None)


class _Opened(AbstractContextManager[None]):
    def __init__(self, hold: Hold) -> None:
        self._hold = hold

    def __enter__(self) -> None:
        self._hold.open()

    def __exit__(self, *_: object) -> None:
        self._hold.close()


def is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident
