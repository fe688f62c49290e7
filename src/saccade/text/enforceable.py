"""What of a JSON schema or a regular expression a grammar can hold an answer to; the rest is refused by name.

xgrammar passes over keywords that it does not know, and over known ones beside certain others. An answer that breaks
the schema would then look like one that keeps it. Only restrictions count: a grammar may allow less than the schema.
Knows only data. Next: engine/sampling/grammar.py, which asks before it compiles.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OR_ELSE = "or_else"  # beside a schema in a structural tag: the one in its place if no grammar can be made of it

# Keywords that restrict a value and have no counterpart in the grammar.
NOT_ENFORCED = (
    "contains", "minContains", "maxContains", "not", "if", "then", "else", "dependentRequired", "dependentSchemas",
    "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
UNKNOWN_FORMATS = ("idn-email", "idn-hostname", "iri", "iri-reference", "regex")  # of the standard; others are names
STRING_KEYWORDS = ("minLength", "maxLength", "pattern", "format")
NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
RANGE_KEYWORDS = NUMBER_KEYWORDS[:-1]
ARRAY_KEYWORDS = ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems", "additionalItems")
OBJECT_KEYWORDS = (
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "unevaluatedProperties",
)  # fmt: skip
CHOICE_KEYWORDS = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")  # each says all that a schema says
RESTRICTIONS = (*CHOICE_KEYWORDS, *STRING_KEYWORDS, *NUMBER_KEYWORDS, *ARRAY_KEYWORDS, *OBJECT_KEYWORDS)
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # whose values are schemas
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE_SCHEMAS = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems")
TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def find_problem(name: str, text: str) -> str | None:
    """What of a constraint would be passed over; None if nothing would."""
    if name == "json_schema":
        return find_unenforced(json.loads(text))
    if name == "regex":
        return find_unenforced_signs(text)
    for form in list_formats(json.loads(text)) if name == "structural_tag" else ():
        problem = find_unenforced(form["json_schema"]) if "json_schema" in form else None
        if form.get("type") == "regex" and isinstance(form.get("pattern"), str):
            problem = find_unenforced_signs(form["pattern"])
        if problem:
            return problem
    return None


def list_formats(value: Any) -> Iterator[dict[str, Any]]:
    """Every format in a structural tag. What a schema holds is none."""
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for name, inner in value.items():
            yield from list_formats(inner) if name != "json_schema" else ()
    for inner in value if isinstance(value, list) else ():
        yield from list_formats(inner)


def find_unenforced(schema: Any) -> str | None:
    """The first thing in a schema that no answer could be made to keep, and where; None if there is none."""
    for place, one in _walk(schema, ""):
        if problem := _check(one, schema):
            return f"{place or 'the schema'}: {problem}"
    return None


def find_unenforced_signs(pattern: str) -> str | None:
    """The first construct in a regular expression that would be passed over; None if there is none."""
    place, is_class = 0, False
    while place < len(pattern):
        sign = pattern[place]
        if sign == "\\":
            place += 2
            continue
        if is_class:
            is_class = sign != "]"
        elif sign == "[":
            is_class = True
        elif pattern.startswith("(?", place) and pattern[place + 2 : place + 3] != ":":
            ahead = pattern[place : place + 4]
            if ahead.startswith(("(?=", "(?!", "(?<=", "(?<!")):
                return f"{ahead!r} looks around, which no grammar does"
            if not ahead.startswith(("(?P<", "(?<")):
                return f"{ahead!r} is no group that a grammar has"
        elif (sign == "^" and place and not pattern[:place].endswith(("(", "|", "(?:"))) or (
            sign == "$" and pattern[place + 1 : place + 2] not in ("", ")", "|")
        ):
            return f"{sign!r} at place {place} stands inside; expected it at an end"
        place += 1
    return None


def _walk(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in a schema, with its place."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for word in SCHEMAS_BY_NAME:
        inner = schema.get(word)
        for name, one in inner.items() if isinstance(inner, Mapping) else ():
            yield from _walk(one, f"{place}/{word}/{name}")
    for word in SCHEMA_LISTS:
        inner = schema.get(word)
        for i, one in enumerate(inner if isinstance(inner, list) else ()):
            yield from _walk(one, f"{place}/{word}/{i}")
    for word in SINGLE_SCHEMAS:
        yield from _walk(schema.get(word), f"{place}/{word}")
    names = schema.get("propertyNames")
    if isinstance(names, Mapping):  # which are texts
        yield from _walk({"type": "string"} | dict(names), f"{place}/propertyNames")


def _check(schema: Mapping[str, Any], root: Any) -> str | None:
    """What of this schema, without those inside of it, cannot be enforced."""
    for word in NOT_ENFORCED:
        if word in schema:
            return f"{word} cannot be enforced"
    if schema.get("uniqueItems"):
        return "uniqueItems cannot be enforced"
    return _check_choice(schema, root) or _check_value(schema)


def _check_choice(schema: Mapping[str, Any], root: Any) -> str | None:
    """Of a schema that refers to others or lists values: nothing beside that counts."""
    choice = next((word for word in CHOICE_KEYWORDS if word in schema), None)
    if choice is None:
        return None
    others = [word for word in RESTRICTIONS if word in schema and word != choice]
    if others:
        return f"{others[0]} beside {choice} cannot be enforced"
    value, types = schema[choice], _list_types(schema)
    if choice == "$ref":
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            return f"$ref {value!r} is not inside of the schema"
        return "type beside $ref cannot be enforced" if types else None
    if choice in ("enum", "const"):
        values = value if choice == "enum" and isinstance(value, list) else [value]
        odd = [one for one in values if types and not _is_of(one, types)]
        return f"{choice}: {odd[0]!r} is not of type {' or '.join(types)}" if odd else None
    branches = value if isinstance(value, list) else []
    if not branches:
        return f"{choice} has no schema"
    if choice == "allOf" and len(branches) > 1:
        return "allOf with several schemas cannot be enforced"
    if types and not all(_list_types(one) and set(_list_types(one)) <= set(types) for one in branches):
        return f"type beside {choice} cannot be enforced"
    if choice == "oneOf" and not _are_apart([_follow(one, root) for one in branches]):
        return "oneOf cannot be enforced: two of its schemas may allow the same value; expected anyOf"
    return None


def _check_value(schema: Mapping[str, Any]) -> str | None:
    types = _list_types(schema)
    strings, numbers = ([word for word in words if word in schema] for words in (STRING_KEYWORDS, NUMBER_KEYWORDS))
    for words, kind in ((strings, ("string",)), (numbers, ("number", "integer"))):
        if words and not types:
            return f"{words[0]} without a type cannot be enforced; expected type {kind[0]!r} beside it"
    text = next((word for word in ("format", "pattern") if word in strings), None)
    if text and len(strings) > 1 and "string" in types:
        return f"{next(word for word in strings if word != text)} beside {text} cannot be enforced"
    if schema.get("format") in UNKNOWN_FORMATS:
        return f"format {schema['format']!r} cannot be enforced"
    if isinstance(schema.get("pattern"), str) and (problem := find_unenforced_signs(schema["pattern"])):
        return f"pattern: {problem}"
    if "multipleOf" in numbers and ("number" in types or any(word in numbers for word in RANGE_KEYWORDS)):
        return f"multipleOf {'of a number' if 'number' in types else 'beside a range'} cannot be enforced"
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(required, list):
        known = properties if isinstance(properties, Mapping) else {}
        missing = [name for name in required if name not in known]
        if missing:
            return f"required: {missing[0]!r} is not in properties"
    if properties and "propertyNames" in schema:
        return "propertyNames beside properties cannot be enforced"
    return None


def _list_types(schema: Any) -> list[str]:
    named = schema.get("type") if isinstance(schema, Mapping) else None
    return [named] if isinstance(named, str) else [one for one in named or () if isinstance(one, str)]


def _is_of(value: Any, types: Sequence[str]) -> bool:
    name = "null" if value is None else TYPE_NAMES.get(type(value), "")
    is_whole = isinstance(value, float) and value.is_integer()
    return name in types or ("number" in types and name == "integer") or ("integer" in types and is_whole)


def _follow(schema: Any, root: Any) -> Any:
    """What a reference names; the schema itself if it is none."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    for name in reference[2:].split("/"):
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _are_apart(schemas: Sequence[Any]) -> bool:
    """Whether no value can match two of them: their types differ, or a property that all require has other values."""
    return all(_are_two_apart(a, b) for i, a in enumerate(schemas) for b in schemas[:i])


def _are_two_apart(a: Any, b: Any) -> bool:
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return False
    values = [_list_values(one) for one in (a, b)]
    if values[0] and values[1]:
        return not _meet(*values)
    types = [{"number" if name == "integer" else name for name in _list_types(one)} for one in (a, b)]
    if types[0] and types[1] and not types[0] & types[1]:
        return True
    if types[0] != {"object"} or types[1] != {"object"}:
        return False
    fixed = [{name: _list_values(_properties(one).get(name)) for name in one.get("required") or ()} for one in (a, b)]
    return any(values and fixed[1].get(name) and not _meet(values, fixed[1][name]) for name, values in fixed[0].items())


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _list_values(schema: Any) -> list[Any]:
    """The values that a schema lists; [] if it lists none."""
    if not isinstance(schema, Mapping):
        return []
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else []


def _meet(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists share a value; 1 and 1.0 are the same, and true is neither."""
    return any(x == y and isinstance(x, bool) == isinstance(y, bool) for x in a for y in b)
