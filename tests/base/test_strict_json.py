"""The one JSON reader, and the one place where what a terminal would obey is spelled out."""

import json
import math

import pytest

from saccade.base.printable import escape, escape_lines, shorten
from saccade.base.strict_json import DEPTH_LIMIT, parse_json, read_json
from saccade.errors import CheckpointError, ConfigError
from saccade.models.dsa.config import ModelConfig

REFUSED = {
    "": "Expecting value", "{}x": "Extra data", "{'a': 1}": "Expecting property name", '{"a": 01}': "delimiter",
    "[" * 100_000: "deep", "[" * (DEPTH_LIMIT + 1) + "]" * (DEPTH_LIMIT + 1): "deep",
    '{"a":' * 500 + "1" + "}" * 500: "deep", "9" * 5000: "4,300 digits", '"\x00"': "control character",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_json_is_one_short_line(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[text]) as error:
        read_json(text.encode())
    assert len(str(error.value)) < 120 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "raw", ['{"a": 1}'.encode(code) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")] + [b'{"\xff": 1}']
)
def test_another_encoding_is_named(raw: bytes) -> None:
    with pytest.raises(ValueError, match="UTF"):
        read_json(raw)


def test_odd_text_is_told_and_the_strict_reading_refuses_it() -> None:
    found = read_json(b'\xef\xbb\xbf{"a": NaN, "b": [{"c": 1, "c": -Infinity}], "d": -0, "e": "-0", "f": -0.5, "d": 2}')
    assert found.repeated == ("c", "d") and found.literals == ("NaN", "-Infinity")
    assert math.isnan(found.value["a"]) and found.value["d"] == 2 and found.value["f"] == -0.5
    assert type(parse_json(b"[-0, 7, -7]")[0][0]) is float and parse_json(b"[-0, 7, -7]")[0][1:] == [7, -7]
    deep = "[" * DEPTH_LIMIT + "]" * DEPTH_LIMIT
    assert json.dumps(parse_json(deep.encode())[0]) == deep
    for raw in (b"\xef\xbb\xbf{}", b'{"a": NaN}', b"[Infinity]"):
        with pytest.raises(ValueError, match="byte order mark|no JSON number"):
            parse_json(raw)


def test_a_key_of_config_json_that_stands_twice_is_refused_by_name() -> None:
    for text in ('{"hidden_size": 1, "hidden_size": 2}', '{"rope_scaling": {"factor": 4, "factor": 40}}'):
        with pytest.raises(ConfigError, match=r"config\.json: stands twice in one object: (hidden_size|factor); which"):
            ModelConfig.from_json(text.encode())
    with pytest.raises(ConfigError, match=r"twice in one object: \\x1b\[2J"):
        ModelConfig.from_json(b'{"\\u001b[2J": 1, "\\u001b[2J": 2}')


@pytest.mark.parametrize("char", ["\x1b", "\x07", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\ud800", "\U000e0041", "\ufeff"])  # fmt: skip
def test_what_a_terminal_would_obey_is_spelled_out(char: str) -> None:
    for shown in (escape(f"a{char}b"), escape_lines(f"a{char}b"), shorten(f"a{char}b", 20)):
        assert shown.isprintable() and "\\" in shown and shown.startswith("a") and shown.endswith("b")
    assert str(CheckpointError(f"{char}: no such file")).isprintable()


def test_everything_else_stays() -> None:
    text = "Grüße, 世界 \u3000 🙂 \\x1b 100 %"
    assert escape(text) == escape_lines(text) == text
    assert escape("a\nb\tc\r") == r"a\nb\tc\r" and escape_lines("a\nb\tc\r") == "a\nb\tc\\r"
    assert shorten("x" * 10**7, 10) == "x" * 7 + "..." and len(shorten("\x1b" * 10**7, 60)) == 60
