"""What the lines of an input file ask for. Every line is checked before anything runs.

Knows no model. Next: answer.py.
"""

import hashlib
import json
from dataclasses import fields, replace
from typing import Any, NamedTuple

from saccade.base.near import ask, find_near
from saccade.base.strict_json import find_repeated
from saccade.base.values import is_integer, show, show_count
from saccade.cli.prompts import name_source, read_bytes
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError

MOST_INPUT_BYTES = 1 << 32  # of an input file, which is held in memory
SHOWN_LINES = 10  # lines that are named if more cannot be served
SAMPLING = tuple(field.name for field in fields(SamplingParams))
KEYS = ("prompt", "token_ids", "id", *SAMPLING)


class Asked(NamedTuple):
    """What one line asks for."""

    number: int  # of the line, from 1
    digest: str  # of its bytes: tells a later run whether it is still the same line
    prompt: str | list[int]
    params: SamplingParams
    id: str | int | None


def read_asked(path: str, base: SamplingParams) -> list[Asked]:
    """Every line that is not blank. `base` is what a line does not say. RequestError names every line that is wrong."""
    raw = read_bytes(path, "--input", MOST_INPUT_BYTES).removeprefix(b"\xef\xbb\xbf")
    asked, refused = list[Asked](), list[str]()
    for number, line in enumerate(raw.split(b"\n"), 1):  # JSON may hold other line breaks, such as U+2028
        if line.strip():
            try:
                asked.append(parse_line(number, line.strip(), base))
            except RequestError as error:
                refused.append(f"line {number}: {error}")
    require_none(refused, name_source(path))
    if not asked:
        raise RequestError(f"--input: {name_source(path)} holds no line; expected one JSON object a line")
    return asked


def parse_line(number: int, line: bytes, base: SamplingParams) -> Asked:
    """One line as what it asks for. RequestError says what is wrong with it."""
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=refuse_twice, parse_constant=refuse_constant)
    except RecursionError:
        raise RequestError("is nested too deeply") from None
    except ValueError as error:  # of UnicodeDecodeError and JSONDecodeError too
        raise RequestError(f"is no JSON object: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"expected a JSON object, found {show(values)}")
    for key in values:
        if key not in KEYS:
            known = f"; known: {', '.join(KEYS[:12])}, ..."
            raise RequestError(f"unknown key {show(key)}{ask(find_near(key, KEYS)) or known}")
    given = {key: value for key, value in values.items() if value is not None}
    text, ids, name = given.pop("prompt", None), given.pop("token_ids", None), given.pop("id", None)
    if (text is None) == (ids is None):
        raise RequestError('expected "prompt" or "token_ids", found ' + ("none" if text is None else "both"))
    if text is not None and not (isinstance(text, str) and text):
        raise RequestError(f"prompt: expected a text, found {show(text)}")
    if ids is not None and not (isinstance(ids, list) and ids and all(map(is_integer, ids))):
        raise RequestError(f"token_ids: expected a list of integers, found {show(ids)}")
    if name is not None and not (isinstance(name, str) or is_integer(name)):
        raise RequestError(f"id: expected a text or an integer, found {show(name)}")
    digest = hashlib.sha256(line).hexdigest()[:16]
    return Asked(number, digest, text or ids or [], replace(base, **given), name)


def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := find_repeated(pairs):
        raise RequestError(f"{show(repeated[0])} is there twice")
    return dict(pairs)


def refuse_constant(text: str) -> None:
    raise RequestError(f"{text} is no JSON")


def require_none(refused: list[str], source: str) -> None:
    """RequestError with the first of the lines that cannot be served, and their number."""
    if refused:
        more = [f"and {len(refused) - SHOWN_LINES:,} more"] if len(refused) > SHOWN_LINES else []
        first = f"{source}: {show_count(len(refused), 'line')} cannot be served, so nothing was run:"
        raise RequestError("\n  ".join([first, *refused[:SHOWN_LINES], *more]))
