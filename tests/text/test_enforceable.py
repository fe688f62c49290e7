"""A schema is refused, or no answer that breaks it matches its grammar: by values that jsonschema refuses."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from saccade.text.enforceable import find_problem, find_unenforced

xgrammar = pytest.importorskip("xgrammar")
from xgrammar.testing import _is_grammar_accept_string as is_accepted  # noqa: E402

# Schemas, and values that break them.
CASES: list[tuple[dict[str, Any], list[Any]]] = [
    ({"type": "string", "pattern": "^a+$", "maxLength": 2}, ["aaa"]),
    ({"type": "string", "pattern": "^a+$", "minLength": 2}, ["a"]),
    ({"type": "string", "pattern": "a"}, ["b"]),
    ({"type": "string", "pattern": "^a"}, ["b"]),
    ({"type": "string", "format": "date", "maxLength": 5}, ["2020-01-01"]),
    ({"type": "string", "minLength": 2}, ["a"]),
    ({"type": "string", "maxLength": 2}, ["aaa"]),
    ({"type": "number", "multipleOf": 0.5}, [0.3]),
    ({"type": "integer", "minimum": 3}, [2]),
    ({"type": "number", "minimum": 3.5}, [3.2]),
    ({"type": "number", "exclusiveMinimum": 3}, [3]),
    ({"type": "number", "maximum": 3}, [10000000000.0]),
    ({"type": "integer", "exclusiveMaximum": 3}, [3]),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [[1, 1]]),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 5}}, [[1]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, [["a"], [1, 2]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, [[1, 2]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [[1, 2]]),
    ({"type": "integer", "not": {"const": 5}}, [5]),
    ({"not": {"type": "integer"}}, [5]),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, [{"a": 1}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "dependentRequired": {"a": ["b"]}}, [{"a": 1}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "dependentSchemas": {"a": {"required": ["b"]}}}, [{"a": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "^a$"}, "additionalProperties": {"type": "integer"}}, [{"b": 1}]),
    ({"type": "object", "properties": {"b": {"type": "integer"}}, "propertyNames": {"pattern": "^a$"}}, [{"b": 1}]),
    ({"type": "object", "patternProperties": {"^a$": {"type": "integer"}}}, [{"a": "x"}]),
    ({"type": "object", "properties": {"b": {"type": "string"}}, "patternProperties": {"^a$": {"type": "integer"}}}, [{"a": "x"}]),
    ({"type": "object", "patternProperties": {"^a$": {"type": "integer"}}, "additionalProperties": {"type": "string"}}, [{"a": "x"}, {"b": 1}]),
    ({"type": "object", "minProperties": 1, "properties": {"a": {"type": "integer"}}}, [{}]),
    ({"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}}, [{"a": 1}]),
    ({"type": "object", "maxProperties": 1, "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}, [{"a": 1, "b": 1}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["z"]}, [{"a": 1}, {}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["z"], "additionalProperties": True}, [{"a": 1}, {}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}, [{"a": "x"}]),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "anyOf": [{"properties": {"b": {"type": "integer"}}, "required": ["b"]}, {"required": ["a"]}]}, [{"b": 1}]),
    ({"type": "integer", "anyOf": [{"minimum": 3}, {"maximum": -3}]}, [0]),
    ({"allOf": [{"type": "integer", "minimum": 2}, {"type": "integer", "maximum": 5}]}, [1, 6]),
    ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"type": "integer"}}, "minimum": 5}, ["x", 3]),
    ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"type": "integer"}}}, ["x"]),
    ({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}]}, [{"a": 1}, {"b": 1}]),
    ({"$ref": "#/$defs/A", "maximum": 5, "$defs": {"A": {"type": "integer"}}}, [7]),
    ({"enum": ["a", 1], "type": "integer"}, ["a"]),
    ({"enum": [1, 2, 3], "minimum": 2}, [1]),
    ({"enum": ["a", "bbb"], "type": "string", "maxLength": 2}, ["bbb"]),
    ({"const": 1, "enum": [2]}, [1]),
    ({"const": 1, "type": "string"}, [1]),
    ({"const": {"a": 1, "b": [1]}}, [{"a": 2}]),
    ({"enum": [1.5, None, True]}, [2]),
    ({"type": ["string", "null"], "maxLength": 1}, ["aa"]),
    ({"type": ["object", "null"], "properties": {"a": {"type": "integer"}}, "required": ["a"]}, [{}]),
    ({"maxLength": 1}, ["aa"]),
    ({"minimum": 5}, [1]),
    ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, [{}, {"a": "x"}]),
    ({"pattern": "^a$"}, ["b"]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False}, [{"b": 1}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": {"type": "string"}}, [{"b": 1}]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "unevaluatedItems": False}, [[1, 2]]),
    ({"type": "string", "format": "regex"}, ["("]),
    ({"$ref": "#A", "$defs": {"X": {"$anchor": "A", "type": "integer"}}}, ["a"]),
    ({"$dynamicRef": "#A", "$defs": {"X": {"$dynamicAnchor": "A", "type": "integer"}}}, ["a"]),
    ({"$ref": "#/definitions/A", "definitions": {"A": {"type": "integer"}}}, ["a"]),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}}, [{"b": "x"}]),
    ({"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}, "required": ["a"]}, [{}]),
    ({"pattern": "^a$", "type": ["string", "null"]}, ["b"]),
    ({"format": "date", "type": ["string", "null"]}, ["b"]),
    ({"multipleOf": 2, "type": ["integer", "null"]}, [3]),
    ({"multipleOf": 2, "type": "integer", "minimum": 5}, [4, 7]),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "required": ["ab"]}, [{}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "required": ["ab"]}, [{}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "propertyNames": {"maxLength": 1}}, [{"ab": 1}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "propertyNames": {"enum": ["a"]}}, [{"ab": 1}]),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "propertyNames": {"pattern": "^ab$"}}, [{"ac": 1}]),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "maxProperties": 1}, [{"a": 1, "ab": 1}]),
    ({"type": "object", "properties": {"b": {"type": "integer"}}, "patternProperties": {"^a": {"type": "integer"}}, "minProperties": 2}, [{"a": 1}, {"b": 1}]),
    ({"type": "array", "unevaluatedItems": {"type": "string"}}, [[1]]),
    ({"type": ["string", "integer"], "minLength": 2, "minimum": 3}, ["a", 2]),
    ({"type": "string", "pattern": "^(?!a).*$"}, ["abc"]),
    ({"type": "string", "pattern": "a^b"}, ["ab"]),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": "a"}, "x": {"type": "integer"}}, "required": ["k", "x"]}, {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]}]}, [{"k": "a"}]),
    ({"type": "number", "minimum": -0.5, "maximum": 1.25}, [-0.6, 1.3, -1, 2]),
]  # fmt: skip
# What clients send, and values that keep it.
KEPT: list[tuple[dict[str, Any], list[Any]]] = [
    ({"type": "object", "properties": {"a": {"type": "integer", "title": "A", "default": 3}}, "required": ["a"], "$schema": "x"}, [{"a": 1}]),
    ({"$defs": {"A": {"enum": ["x", "y"], "type": "string"}}, "properties": {"a": {"$ref": "#/$defs/A", "description": "x"}}, "type": "object"}, [{"a": "x"}]),
    ({"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None}, ["abc", None]),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}, {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]}]}, [{"k": "b"}]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"]),
    ({"type": "string", "format": "date-time"}, ["2026-11-30T12:00:00Z"]), ({"type": "string", "format": "color"}, ["red"]),
    ({"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1, "maxItems": 2}, [[1.5]]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "propertyNames": {"pattern": "^[a-z]+$"}}, [{"ab": 1}]),
    ({"type": ["string", "null"], "enum": ["a", None]}, ["a", None]), ({"const": 3, "type": "number"}, [3]),
    ({"type": "integer", "anyOf": [{"type": "integer", "minimum": 3}]}, [4]), ({"allOf": [{"type": "integer"}]}, [4]),
]  # fmt: skip


def fits(schema: dict[str, Any], value: Any) -> bool | None:
    """Whether a value matches a schema's grammar; None if there is none."""
    try:
        return bool(is_accepted(xgrammar.Grammar.from_json_schema(json.dumps(schema)), json.dumps(value)))
    except RuntimeError:
        return None


@pytest.mark.parametrize("place", range(len(CASES)))
def test_no_answer_breaks_a_schema_that_is_not_refused(place: int) -> None:
    schema, values = CASES[place]
    checked = Draft202012Validator(schema, format_checker=FormatChecker())
    for value in values:
        assert not checked.is_valid(value)
        if find_unenforced(schema) is None:
            assert not fits(schema, value)
        else:
            assert find_unenforced({"type": "object", "properties": {"x": schema}}).startswith("/properties/x")  # type: ignore[union-attr]


@pytest.mark.parametrize("place", range(len(KEPT)))
def test_what_clients_send_is_not_refused(place: int) -> None:
    schema, values = KEPT[place]
    assert find_unenforced(schema) is None
    for value in values:
        assert Draft202012Validator(schema).is_valid(value) and fits(schema, value)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a(?=b)", "'(?=b' looks around"), ("(?<!a)b", "'(?<!' looks around"), ("(?i)a", "'(?i)' is no group"), ("a^b", "'^' at place 1 stands inside"),
        ("a$b", "'$' at place 1 stands inside"), (r"\(?=a[(?=]", None), ("^(a|^b$)$", None), ("[^a]$", None), ("(?:a)(?P<x>b)", None),
    ],
)  # fmt: skip
def test_signs_of_expressions_that_are_passed_over(pattern: str, text: str | None) -> None:
    found = find_problem("regex", pattern)
    assert found is None if text is None else found is not None and found.startswith(text)


def test_tags_are_looked_through() -> None:
    inner = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"type": {"not": {}}}}}
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": [{"type": "any_text"}, inner]}}
    assert find_problem("structural_tag", json.dumps(tag)) == "/properties/type: not cannot be enforced"
    assert find_problem("grammar", "root ::= x") is None
