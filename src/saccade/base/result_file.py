"""The one file that a command writes its result to: refused before the work, and then written whole or not at all.

Knows no format and no command. Next: cli/inside.py, bench/record.py.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from saccade.base.printable import escape
from saccade.errors import RequestError


def require_place(option: str, path: str, reads: Mapping[str, str | None] | None = None) -> None:
    """RequestError, before anything is loaded or measured, if no file can be written at `path`. `reads`: by option, the
    files of the same command; none may be this one, whose contents would be lost."""
    found = ""
    if not path:
        found = "an empty name"
    elif path == "-":
        found = "standard output; ./- is a file of that name"
    elif os.path.isdir(path):
        found = "a directory"
    elif not os.path.isdir(os.path.dirname(path) or "."):
        found = "no such directory"
    elif not os.access(path if os.path.lexists(path) else os.path.dirname(path) or ".", os.W_OK):
        found = "no right to write"
    for other, name in (reads or {}).items():
        if not found and name not in (None, "", "-") and is_same_file(path, str(name)):
            found = f"the file of {other}, which would be lost"
    if found:
        raise RequestError(f"{option}: expected a file to write to, found {found}: {escape(path)}")


def is_same_file(a: str, b: str) -> bool:
    """Whether two names mean one file, by links too; it need not be there yet. Devices and pipes lose nothing."""
    try:
        return os.path.samefile(a, b) and os.path.isfile(a)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def write_result(option: str, path: str, text: str) -> None:
    """Write a text in UTF-8. If not all of it can be written, what was at `path` stays, and it is a RequestError."""
    at = os.path.realpath(path)  # a link stays a link
    scratch = Path(at).with_name(f".saccade-{os.getpid()}")  # short: a name may be as long as the system allows
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe
            Path(path).write_text(text, "utf-8")
            return
        try:
            scratch.touch(exist_ok=False)
        except OSError:  # in a folder without the right to write there may be a file that has it
            Path(at).write_text(text, "utf-8")
            return
        scratch.write_text(text, "utf-8")
        if os.path.exists(at):
            shutil.copymode(at, scratch)
        scratch.replace(at)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{option}: {escape(path)} cannot be written: {reason}") from None
    finally:
        with suppress(OSError):
            scratch.unlink()
