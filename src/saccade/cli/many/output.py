"""The file that answers are written to, one whole line each, in the order of the input.

A run that was cut short has lost nothing that was written, and the same command goes on behind it. Next: answer.py.
"""

import fcntl
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from saccade.base.printable import escape
from saccade.cli.many.asked import Asked
from saccade.errors import RequestError


@contextmanager
def open_output(path: str, asked: list[Asked]) -> Iterator[tuple[BinaryIO, int]]:
    """The output, open behind the answers that it holds already, and their number. RequestError if it holds anything
    else, or if another run writes to it."""
    if path == "-":
        yield sys.stdout.buffer, 0
        return
    is_new = not os.path.lexists(path)
    try:
        file = open(path, "ab+")  # noqa: SIM115 - nothing is changed before it is known what is in it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"--output: {escape(path) or 'an empty name'} cannot be written: {reason}") from None
    try:
        done = 0
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            lock(file, path)
            file.seek(0)
            done, size = count_done(file, path, asked)
            file.truncate(size)
        yield file, done
    finally:
        is_empty = os.fstat(file.fileno()).st_size == 0
        with suppress(OSError):  # each line is flushed: what could not be written has been said
            file.close()
        if is_new and is_empty:
            os.unlink(path)  # a model that cannot be loaded leaves nothing behind


def lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"--output: another run writes to {escape(path)}") from None
    except OSError:
        pass  # a file system without locks


def count_done(lines: Iterable[bytes], path: str, asked: list[Asked]) -> tuple[int, int]:
    """How many answers are there already, and how many bytes they take; a last line may be cut short."""
    done = size = 0
    for done, line in enumerate(lines):
        one = asked[done] if done < len(asked) else None
        begin = f'{{"line": {one.number}, "input": "{one.digest}"'.encode() if one else b""
        is_cut = not line.endswith(b"\n")
        if not begin or not (line.startswith(begin) or (is_cut and begin.startswith(line))):
            what = f"line {one.number} of the input" if one else "any line of the input"
            text = f"line {done + 1} of {escape(path)} is not the answer to {what}, and nothing is overwritten"
            raise RequestError(f"--output: {text}: name another file, or remove this one")
        if is_cut:
            return done, size
        size += len(line)
    return (done + 1, size) if size else (0, 0)


def write_line(file: BinaryIO, text: str) -> None:
    """One answer, on the disk as far as the system says. RequestError names the output that takes no more."""
    try:
        file.write(text.encode() + b"\n")
        file.flush()
    except BrokenPipeError:  # a reader that went away wants to hear nothing
        raise
    except OSError as error:
        name = "standard output" if file is sys.stdout.buffer else escape(str(file.name))
        raise RequestError(f"--output: {name} cannot be written: {error.strerror or error}") from None
