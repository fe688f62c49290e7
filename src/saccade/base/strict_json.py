"""A strict JSON reader for a checkpoint's files: headers, config.json, index.json and the files beside them.

Python's own reader keeps the last of two equal keys, and takes NaN for a number, -0 for an integer and UTF-16 for
UTF-8. It does so silently. This one reports equal keys and NaN to the caller, who refuses them or writes a note. It
refuses the rest, each with one short line. Knows no file and no model.
"""

import json
from collections.abc import Sequence
from json import JSONDecodeError
from typing import Any, NamedTuple

DEPTH_LIMIT = 128  # of objects and lists in each other: the limit of the safetensors library; real files have 10
WIDE = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\x00{": "UTF-16",
    b"{\x00": "UTF-16",
}
MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8


class Json(NamedTuple):
    """A value, and what is odd about its text."""

    value: Any
    repeated: tuple[str, ...]  # keys that stand twice in one object; `value` has the last
    literals: tuple[str, ...]  # NaN, Infinity and -Infinity, which are not JSON


def parse_json(raw: bytes) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the keys that stand twice in one of its objects. ValueError, in one short line,
    for anything else; NaN and a byte order mark count as such."""
    if raw.startswith(MARK):
        raise ValueError("it begins with a byte order mark")
    found = read_json(raw)
    if found.literals:
        raise ValueError(f"{found.literals[0]} is no JSON number")
    return found.value, list(found.repeated)


def read_json(raw: bytes) -> Json:
    """As `parse_json`, but lenient as people's own files need it: NaN is reported, a byte order mark is passed over.

    Python keeps the last of two equal keys in silence, and asking it for pairs costs four times the time. So count
    colons: each key has one, and strings can only add some. As many colons as keys were kept in the outer object and
    the objects in it (headers and index.json are no deeper): nothing was dropped, exactly.
    """
    wide = next((name for start, name in WIDE.items() if raw.startswith(start)), None)
    if wide is not None:
        raise ValueError(f"it is {wide}, expected UTF-8")
    try:
        text = raw.removeprefix(MARK).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"byte {e.start:,} is no UTF-8") from None
    literals: list[str] = []

    def note(literal: str) -> float:
        literals.append(literal)
        return float(literal)

    # "-0" is an integer to Python and none to the safetensors library, so -0 becomes the float that it is elsewhere.
    whole: dict[str, Any] = {"parse_int": _read_integer} if "-0" in text else {}
    value = _load(text, parse_constant=note, **whole)
    literals = list(dict.fromkeys(literals))
    if type(value) is dict:
        kept = len(value) + sum(len(v) for v in value.values() if type(v) is dict)
        if text.count(":") == kept:
            return Json(value, (), tuple(literals))
    repeated: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(find_repeated(pairs))
        return dict(pairs)

    _load(text, object_pairs_hook=keep)
    return Json(value, tuple(repeated), tuple(literals))


def _read_integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def find_repeated(pairs: Sequence[tuple[str, Any]]) -> list[str]:
    """The keys of an object that stand in it again: readers take the first or the last."""
    if len(dict(pairs)) == len(pairs):
        return []
    seen: set[str] = set()
    return [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


def _load(text: str, **hooks: Any) -> Any:
    try:
        value = json.loads(text, **hooks)
    except JSONDecodeError as e:
        raise ValueError(str(e)) from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH_LIMIT} deep") from None
    except ValueError:  # int() refuses 4,301 digits, and json calls nothing else that could
        raise ValueError("a number has more than 4,300 digits") from None
    if text.count("[") + text.count("{") > DEPTH_LIMIT and _is_deep(value):
        raise ValueError(f"it is nested more than {DEPTH_LIMIT} deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other more than DEPTH_LIMIT times."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        inner = (v.values() if type(v) is dict else v for v in level if type(v) in (dict, list))
        level = [v for values in inner for v in values if type(v) in (dict, list)]
        if not level:
            return False
    return True
