"""How far a rank is, and where: counts of steps and messages, and the line of code that its stepping thread is at.

What a thread does is read from its stack, from outside: nothing is written down on the way but a count. So a rank that
compiles kernels is told from one that hangs. Knows no links. Next: watch.py judges.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

HANG_SECONDS = 60.0  # without progress while others wait; a step of a GPU takes milliseconds, of a CPU seconds
COMPILERS = (os.sep + "triton" + os.sep, os.sep + "_inductor" + os.sep)  # in paths of files: kernels are being made
PACKAGE = os.sep + "saccade" + os.sep


class RankProgress(NamedTuple):
    """Of one rank at one moment. Ranks are compared by the first two."""

    steps: int = 0  # that it has begun
    messages: int = 0  # that it has sent to other ranks within them
    where: str = ""  # "attention.py:57", the innermost line of ours
    is_compiling: bool = False


class Tracker:
    """Of this process. One thread works at a time; another one reads."""

    def __init__(self, count_messages: Callable[[], int] = lambda: 0) -> None:
        self.count_messages = count_messages
        self._steps = 0
        self._thread: int | None = None  # that works

    @contextmanager
    def working(self) -> Iterator[None]:
        self._steps += 1
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    @property
    def is_working(self) -> bool:
        return self._thread is not None

    def read(self) -> RankProgress:
        frame = sys._current_frames().get(self._thread or 0)
        return RankProgress(self._steps, self.count_messages(), *describe_stack(frame))


def describe_stack(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of this package, and whether a compiler is at work."""
    where, is_compiling = "", False
    while frame is not None:
        path = frame.f_code.co_filename
        is_compiling = is_compiling or any(part in path for part in COMPILERS)
        if not where and PACKAGE in path:
            where = f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return where, is_compiling


def find_hung(
    progress: Mapping[int, RankProgress], still: Mapping[int, float], patience: float = HANG_SECONDS
) -> int | None:
    """The rank that others wait for: behind the furthest of them, not compiling, and `still` for so many seconds."""
    furthest = max(each[:2] for each in progress.values())
    behind = [rank for rank, each in progress.items() if each[:2] < furthest and not each.is_compiling]
    hung = [rank for rank in behind if still[rank] >= patience]
    return min(hung, key=lambda rank: progress[rank][:2], default=None)
