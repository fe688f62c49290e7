"""Prompts and token ids from a command line: as an argument, from a file, or from standard input.

An argument of a command has at most 128 KiB on Linux, 30,000 tokens; a file has room for any context. Knows no model.
Next: many/ for files of many prompts.
"""

import re
import sys

from saccade.base.printable import escape
from saccade.base.values import show
from saccade.cli.terminal import say
from saccade.errors import RequestError

MOST_PROMPT_BYTES = 1 << 26  # of one prompt: 400 bytes a token at the longest context, and an end to /dev/zero


def choose_one(command: str, options: dict[str, str | None]) -> str:
    """The one option that was given. RequestError for none or several."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        *most, last = options
        found = " and ".join(given) or "none of them"
        raise RequestError(f"{command}: expected one of {', '.join(most)} and {last}, found {found}")
    return given[0]


def read_bytes(path: str, option: str, limit: int = MOST_PROMPT_BYTES) -> bytes:
    """What a file holds, or standard input for "-". RequestError if it cannot be read or is longer than `limit`."""
    name = name_source(path)
    try:
        if path == "-":
            if sys.stdin is None:
                raise RequestError(f"{option} -: standard input is closed")
            if sys.stdin.isatty():
                say("reading from the terminal; Ctrl-D on a line of its own ends it")
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(path, "rb") as f:
                data = f.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise RequestError(f"{option}: {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > limit:
        raise RequestError(f"{option}: {name} is longer than {limit:,} bytes")
    return data


def name_source(path: str) -> str:
    return "standard input" if path == "-" else escape(path) or "an empty name"


def read_text(path: str, option: str) -> str:
    """The text of a file, or of standard input for "-". Its last line break is dropped, as a shell does for $(...)."""
    data = read_bytes(path, option)
    try:
        text = data.decode("utf-8-sig")  # without the mark that some editors put in front
    except UnicodeDecodeError as error:
        raise RequestError(f"{option}: byte {error.start} of {name_source(path)} is no text in UTF-8") from None
    text = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    if not text:
        raise RequestError(f"{option}: {name_source(path)} is empty; expected text")
    return text


def parse_tokens(text: str, option: str) -> list[int]:
    """Token ids with commas, blanks or line breaks between them; a JSON list is such a text too."""
    inner = text.strip()
    inner = inner[1:-1].strip() if inner.startswith("[") and inner.endswith("]") else inner
    try:
        return [int(token) for token in re.split(r"\s*,\s*|\s+", inner)]
    except ValueError:
        raise RequestError(f"{option}: expected token ids like 1,2,3, found {show(text)}") from None
