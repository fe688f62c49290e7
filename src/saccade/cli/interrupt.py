"""Ctrl-C at any moment ends in one line and exit code 130.

Within a command the first Ctrl-C raises KeyboardInterrupt, so that the command ends in order. Before it and after it,
while torch is imported, and from the second on, Ctrl-C ends the process at once: an import turns the exception into
errors of its own, and the interpreter's end prints it. It imports nothing heavy: __main__.py does so before all else.
Next: terminal.py, which says the line for a command that ends in order.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

CODE = 130  # 128 + SIGINT, as a shell counts
INTERRUPT_LINE = b"saccade: interrupted\n"
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it

Handler = Callable[[int, FrameType | None], Any]


def exit_at_once(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    """Say the line and end the process, whatever it is doing."""
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, (SHOW_CURSOR + b"\r" if os.isatty(2) else b"") + INTERRUPT_LINE)
    os._exit(CODE)


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once. Where it is ignored, as under nohup, it stays ignored."""
    set_handler(exit_at_once)


def end(code: int) -> None:
    """The work is done and written: from now on Ctrl-C only makes the end come sooner."""
    set_handler(lambda number, frame: os._exit(code))


@contextlib.contextmanager
def last_words(code: int) -> Iterator[None]:
    """Say inside how a command ended: one line, so Ctrl-C waits for it, and from then on ends the process in silence,
    with `code`. The second one does not wait. Only in a process that `end_on_interrupt` made ours."""
    if signal.getsignal(signal.SIGINT) is not exit_at_once:
        yield
        return
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            os._exit(code)
        pressed.append(number)

    set_handler(note)
    yield
    if pressed:
        os._exit(code)
    end(code)


def set_handler(handler: Handler) -> None:
    with contextlib.suppress(ValueError):  # only the main thread may, and only it is interrupted
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)


def raise_once(number: int, frame: FrameType | None) -> None:
    """End the command in order; if that takes too long for the user, or an import is under way, at once."""
    set_handler(exit_at_once)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            exit_at_once()
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Ctrl-C does so inside, and as before behind it."""
    before = signal.getsignal(signal.SIGINT)
    set_handler(handler)
    try:
        yield
    finally:
        if callable(before):
            set_handler(before)
