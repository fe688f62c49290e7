"""What each field of SamplingParams has to be, and as what it is kept: one row a field.

Knows neither torch nor tokenizers. Next: engine/params.py, which says what the fields mean.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from saccade.base.values import is_count, is_integer, is_number

MOST_ANSWERS = 128  # of one prompt, as in OpenAI's API
MOST_BIASES = 1024  # of one request: entries are copied to the device with each step
MOST_PROMPT_LOGPROBS = 100  # likeliest tokens of each place of a prompt: 7 MB in a step of 4,096 tokens
MOST_GRAMMAR = 1 << 16  # characters of a schema, expression or grammar: up to a second of compiling
MOST_TAG = 1 << 19  # characters of a structural tag, which may hold the schemas of 100 tools
DEEPEST_SCHEMA = 64  # objects and lists in each other: 1,000 of them compile for more than 20 s

GRAMMARS = ("json_schema", "regex", "grammar", "structural_tag")


def _is_from(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and least <= value <= most


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_token(value: object) -> bool:
    return is_count(value, 0)


def _are_biases(value: Any) -> bool:
    try:
        pairs = _own_biases(value)
    except (TypeError, ValueError):
        return False
    is_right = all(_is_token(token) and is_number(bias) and abs(bias) <= 100 for token, bias in pairs)
    return is_right and len(pairs) <= MOST_BIASES and len({token for token, _ in pairs}) == len(pairs)


def _own_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs in order of their token; ids of JSON are texts."""
    pairs = value.items() if isinstance(value, Mapping) else value
    read = [(int(token) if isinstance(token, str) and token.isdecimal() else token, bias) for token, bias in pairs]
    return tuple(sorted((int(t) if is_integer(t) else t, float(b) if is_number(b) else b) for t, b in read))


def is_stop(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_stops(value: object) -> bool:
    return isinstance(value, str | list | tuple) and all(map(is_stop, [value] if isinstance(value, str) else value))


def _own_stops(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_GRAMMAR


def _is_object(most: int) -> Callable[[Any], bool]:
    """Of JSON, in at most so many characters."""

    def is_right(value: Any) -> bool:
        try:
            text = _own_schema(value)
            found = json.loads(text) if len(text) <= most else None
            return isinstance(found, dict) and find_depth(found) <= DEEPEST_SCHEMA
        except (TypeError, ValueError, RecursionError):
            return False

    return is_right


def find_depth(value: object) -> int:
    """Of lists and dicts in each other."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [item for items in inner for item in items]
    return depth - 1


def _own_schema(value: Any) -> str:
    """As text. The order of its keys stays: it is that of the answer's."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)


# Each field with what it has to be, and as what it is kept. None passes where it is the default.
FieldRule = tuple[str, str, Callable[[Any], bool], Callable[[Any], Any]]
_LOGPROBS = "an integer of at least 0 and below 2**63"
_BIASES = f"at most {MOST_BIASES:,} token ids, each once and with a number from -100 to 100"
_GRAMMAR = f"a text of 1 to {MOST_GRAMMAR:,} characters"
_SCHEMA = f"a JSON schema: an object of at most {MOST_GRAMMAR:,} characters, {DEEPEST_SCHEMA} deep at most"
FIELD_RULES: tuple[FieldRule, ...] = (
    ("max_tokens", "an integer of at least 1 and below 2**63", lambda v: is_count(v, 1), int),
    ("temperature", "a finite number of at least 0", lambda v: is_number(v) and v >= 0, float),
    ("top_k", "an integer of at least 0 (0: no limit)", lambda v: is_integer(v) and v >= 0, int),
    ("top_p", "a number above 0 and at most 1", lambda v: is_number(v) and 0 < float(v) <= 1, float),
    ("seed", "an integer", is_integer, int),
    ("stop", "strings that are not empty", _are_stops, _own_stops),
    ("ignore_eos", "True or False", _is_flag, bool),
    ("logprobs", _LOGPROBS, lambda v: is_count(v, 0), int),
    ("n", f"an integer from 1 to {MOST_ANSWERS}", lambda v: is_count(v, 1) and v <= MOST_ANSWERS, int),
    ("min_p", "a number from 0 to 1", _is_from(0, 1), float),
    ("presence_penalty", "a number from -2 to 2", _is_from(-2, 2), float),
    ("frequency_penalty", "a number from -2 to 2", _is_from(-2, 2), float),
    ("repetition_penalty", "a number above 0 (0.000001 to 1,000,000)", _is_from(1e-6, 1e6), float),
    ("logit_bias", _BIASES, _are_biases, _own_biases),
    ("min_tokens", "an integer of at least 0 and below 2**63", lambda v: is_count(v, 0), int),
    (
        "stop_token_ids",
        f"at most {MOST_BIASES:,} token ids, integers of at least 0",
        lambda v: isinstance(v, list | tuple) and len(v) <= MOST_BIASES and all(map(_is_token, v)),
        lambda v: tuple(map(int, v)),
    ),
    ("include_stop_str_in_output", "True or False", _is_flag, bool),
    ("skip_special_tokens", "True or False", _is_flag, bool),
    (
        "prompt_logprobs",
        f"an integer from 0 to {MOST_PROMPT_LOGPROBS}",
        lambda v: is_count(v, 0) and v <= MOST_PROMPT_LOGPROBS,
        int,
    ),
    ("json_schema", _SCHEMA, _is_object(MOST_GRAMMAR), _own_schema),
    ("regex", _GRAMMAR, _is_text, str),
    ("grammar", _GRAMMAR, _is_text, str),
    (
        "structural_tag",
        f"a structural tag of xgrammar: an object of at most {MOST_TAG:,} characters, {DEEPEST_SCHEMA} deep at most",
        _is_object(MOST_TAG),
        _own_schema,
    ),
)  # fmt: skip
