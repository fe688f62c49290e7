"""What a command line printed and how it ended; the fixture `run` in conftest.py runs one in this process."""

from collections.abc import Callable
from typing import NamedTuple


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]
