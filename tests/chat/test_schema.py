"""Values of arguments as JSON: what the schema of the tool says decides."""

import json
from typing import Any

import pytest

from saccade.chat.schema import find_types, write_value

ANY, STRING, INTEGER, NUMBER = None, {"type": "string"}, {"type": "integer"}, {"type": "number"}
SCHEMAS: dict[str, Any] = {
    "string": STRING, "integer": INTEGER, "number": NUMBER, "boolean": {"type": "boolean"}, "object": {"type": "object"},
    "array": {"type": "array"}, "null or string": {"type": ["null", "string"]},
    "number or string": {"anyOf": [{"type": "number"}, {"type": "string"}]}, "nullable": {"type": "integer", "nullable": True},
    "words": {"enum": ["a", "b"]}, "one": {"const": 1}, "reference": {"$ref": "#/$defs/Name"},
    "alternatives": {"oneOf": [{"$ref": "#/$defs/Name"}, {"type": "null"}]}, "all": {"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]},
    "no type": {"description": "?"}, "items": {"items": {}}, "itself": {"$ref": "#/$defs/Loop"}, "elsewhere": {"$ref": "http://x/y"},
}  # fmt: skip
DEFS = {"Name": {"type": "string"}, "Loop": {"$ref": "#/$defs/Loop"}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": SCHEMAS, "$defs": DEFS}},
    }
]

# (schema, what the model wrote, whether it says that this is a text, the value as JSON)
CASES = [
    ("string", "3", None, '"3"'), ("string", '{"a": 1}', None, '"{\\"a\\": 1}"'), ("string", " é\n", None, '" é\\n"'),
    ("integer", "3", None, "3"), ("integer", " 3\n", None, "3"), ("integer", "three", None, '"three"'), ("integer", "3.0", None, "3.0"),
    ("number", "1e+21", None, "1e+21"), ("number", "-0.50", None, "-0.50"), ("number", "NaN", None, '"NaN"'), ("number", "007", None, '"007"'),
    ("boolean", "true", None, "true"), ("boolean", "True", None, "true"), ("boolean", "1", None, "1"),
    ("object", '{"a": [1, {"b": null}]}', None, '{"a": [1, {"b": null}]}'), ("object", "{'a': True}", None, '{"a": true}'),
    ("object", '{"a": 1, "a": 2}', None, '{"a": 2}'), ("object", "[" * 100_000, None, json.dumps("[" * 100_000)),
    ("array", "[0, 1e+21]", None, "[0, 1e+21]"), ("array", "__import__('os')", None, '"__import__(\'os\')"'),
    ("null or string", "null", None, "null"), ("null or string", "x", None, '"x"'), ("null or string", "3", None, '"3"'),
    ("number or string", "3", None, "3"), ("number or string", "3 km", None, '"3 km"'), ("nullable", "null", None, "null"),
    ("words", "a", None, '"a"'), ("one", "1", None, "1"), ("reference", "3", None, '"3"'), ("alternatives", "null", None, "null"),
    ("alternatives", "3", None, '"3"'), ("all", "3", None, "3"), ("no type", "3", None, "3"), ("no type", "x", None, '"x"'),
    ("no type", '"x"', None, '"\\"x\\""'), ("items", "[1]", None, "[1]"), ("itself", "3", None, "3"), ("elsewhere", "3", None, "3"), ("unknown", "3", None, "3"),
    ("string", "007", True, '"007"'), ("integer", "7", True, "7"), ("no type", "7", True, '"7"'), ("unknown", "7", True, '"7"'),
    ("integer", "7", False, "7"), ("string", "7", False, '"7"'), ("object", '{"a": 1}', False, '{"a": 1}'), ("array", "[1,", False, '"[1,"'),
    ("no type", '"x"', False, '"x"'),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "raw", "is_text", "expected"), CASES)
def test_a_value_is_what_its_schema_says(schema: str, raw: str, is_text: bool | None, expected: str) -> None:
    written = write_value(raw, find_types(TOOLS, "f", schema), is_text)
    assert written == expected
    json.loads(written)


def test_odd_schemas_say_nothing() -> None:
    for parameters in (None, 3, {}, {"properties": 3}, {"properties": {"a": 3}}, {"properties": {"a": {"type": 3}}}):
        assert find_types([{"function": {"name": "f", "parameters": parameters}}], "f", "a") is None
    assert find_types([], "f", "a") is None
    assert find_types([{"function": {"name": "f", "parameters": {"additionalProperties": STRING}}}], "f", "a") == {
        "string"
    }
