"""Values of arguments that models write as plain text, as JSON: what the schema of the tool says decides.

GLM writes `<arg_value>3</arg_value>` for the number and for the text alike; DeepSeek-V3.2 marks texts. Next: calls.py.
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saccade.base.strict_json import find_repeated

JSON_NAMES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
TOOL_NAME = re.compile(r"[^\s<>{}\"']+")  # a marker that is followed by anything else is only talked about
MOST_STEPS = 32  # of references and alternatives that are followed: a schema may point to itself
LONGEST_LITERAL = 10_000  # characters that may be tried as a literal of Python

Types = frozenset[str] | None  # of JSON; None: the schema says nothing


def find_types(tools: Sequence[Mapping[str, Any]], tool: str, key: str) -> Types:
    """Which types the schema of `tool` allows for its argument `key`."""
    schema, parameters = _find_schema(tools, tool, key)
    return _collect(schema, parameters, MOST_STEPS)


def strip_value(raw: str, tools: Sequence[Mapping[str, Any]], tool: str, key: str) -> str:
    """A value without the blanks around it, where its schema lists values and only so it is one of them."""
    schema, parameters = _find_schema(tools, tool, key)
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        schema = _follow(schema["$ref"], parameters)
    if not isinstance(schema, Mapping):
        return raw
    enum = schema.get("enum")
    listed = enum if isinstance(enum, list) else [schema.get("const")]
    return raw.strip() if raw not in listed and raw.strip() in listed else raw


def _find_schema(tools: Sequence[Mapping[str, Any]], tool: str, key: str) -> tuple[Any, Mapping[str, Any]]:
    """The schema of an argument, and that of all of them, in which it may refer to others."""
    functions = [found["function"] for found in tools if found["function"]["name"] == tool]
    parameters = functions[0].get("parameters") if functions else None
    if not isinstance(parameters, Mapping):
        return None, {}
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return schema if schema is not None else parameters.get("additionalProperties"), parameters


def write_value(raw: str, types: Types, is_text: bool | None) -> str:
    """`raw` as JSON. `is_text`: what the model says of it; None: it does not say, then a text is written as it is and
    anything else as JSON. A value keeps its digits: 1e+21 stays 1e+21."""
    found = read_literal(raw, types)
    if found is None:
        return write_json(raw)
    value, text = found
    fits = types is None or _is_allowed(value, types)
    if is_text:  # against the schema only where that has no text at all
        return text if types is not None and "string" not in types and fits else write_json(raw)
    if is_text is None and isinstance(value, str):
        return write_json(raw)
    return text if fits or types is None or "string" not in types else write_json(raw)


def read_literal(raw: str, types: Types) -> tuple[Any, str] | None:
    """The value that `raw` spells in JSON, and its text; None if it spells none. Where the schema has no text, what
    Python would write counts as well: True, None, {'a': 1}."""
    text = raw.strip()
    try:
        return read_strictly(text), text
    except (ValueError, RecursionError):
        pass
    if types is None or "string" in types or len(text) > LONGEST_LITERAL:
        return None
    try:
        value = ast.literal_eval(text)
        return value, json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def read_strictly(text: str) -> Any:
    """JSON alone: ValueError for NaN, and for a key that stands twice, of which readers take one or the other."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_join_pairs)


def write_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _join_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if find_repeated(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _is_allowed(value: Any, types: frozenset[str]) -> bool:
    name = JSON_NAMES.get(type(value), "")
    if name == "integer":
        return bool(types & {"integer", "number"})
    is_whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
    return name in types or (is_whole and "integer" in types)


def _collect(schema: Any, root: Mapping[str, Any], steps: int) -> Types:
    """The types that a schema allows."""
    if not isinstance(schema, Mapping) or steps <= 0:
        return None
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,)) | ({"null"} if schema.get("nullable") is True else set())
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str)) or None
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list) and values:
            return frozenset(JSON_NAMES.get(type(value), "object") for value in values)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _collect(_follow(reference, root), root, steps - 1)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return _join(_collect(one, root, steps // 2) for one in schema[word])
    if isinstance(schema.get("allOf"), list):
        found = [types for one in schema["allOf"] if (types := _collect(one, root, steps // 2)) is not None]
        return frozenset.intersection(*found) if found else None
    if "properties" in schema:
        return frozenset(("object",))
    return frozenset(("array",)) if "items" in schema else None


def _join(alternatives: Iterable[Types]) -> Types:
    """All types of any alternative; None as soon as one allows everything."""
    found: frozenset[str] = frozenset()
    for types in alternatives:
        if types is None:
            return None
        found |= types
    return found or None


def _follow(reference: str, root: Mapping[str, Any]) -> Any:
    """What "#/$defs/Name" points to; None for what lies elsewhere."""
    if not reference.startswith("#"):
        return None
    place: Any = root
    for name in reference[1:].strip("/").split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        place = place.get(name) if name and isinstance(place, Mapping) else (place if not name else None)
    return place
