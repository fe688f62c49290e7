"""The first bytes of a checkpoint's files: the headers, read but not parsed, and downloads that have not ended.

What cannot be read becomes a Problem. Next: index.py puts the starts of all files together, header.py parses one.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from saccade.checkpoint.header import HEADER_LIMIT, header_bytes
from saccade.errors import Problem

# What stands beside a file as long as its download has not ended: such a file has its size from the beginning, and
# holds zeros where nothing has come yet.
UNFINISHED = "unfinished"  # the problem's kind; what has come can still be read and judged
CONTROLS = {".aria2": "aria2", ".st": "axel", ".lftp-pget-status": "lftp"}


class Header(NamedTuple):
    """What was read of one file: its first bytes up to the end of the header, or why that failed."""

    file: str
    size: int
    raw: bytes
    problem: Problem | None = None
    control: str = ""  # the file beside it that says that its download has not ended


def read_start(folder: Path, name: str, whole: bool = False) -> Header:
    """The first bytes of a file: all of them, or those of the safetensors header."""
    try:
        if not stat.S_ISREG((folder / name).stat().st_mode):  # before open(), which would wait on a pipe
            return Header(name, 0, b"", Problem("unreadable", name, "is not a regular file; expected one"))
        with open(folder / name, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if whole:
                return Header(name, size, f.read(HEADER_LIMIT + 1))
            first = f.read(8)
            end = header_bytes(first, name, size)
            if isinstance(end, Problem):
                return Header(name, size, first, end)
            return Header(name, size, first + f.read(end - 8))
    except OSError as e:
        text = f"cannot be read: {e.strerror}; check its permissions, or that it is no dead link"
        return Header(name, 0, b"", Problem("unreadable", name, text))


def mark_unfinished(header: Header, names: Sequence[str]) -> Header:
    """With the control file among `names`, if there is one, of a download that has not ended."""
    return header._replace(control=next((n for c in CONTROLS if (n := header.file + c) in names), ""))


def explain_control(header: Header) -> Problem:
    by = CONTROLS[header.control.removeprefix(header.file)]
    text = (
        f"is being downloaded, or its download broke off: {header.control} lies beside it, so parts of it may still be"
    )
    text += f" zeros; let {by} finish, or delete {header.control} if the file is whole (--sha256 tells)"
    return Problem(UNFINISHED, header.file, text)
