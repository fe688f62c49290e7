"""Answers in pieces: any cut gives the same deltas, nothing is lost, and what is no call is text."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.chat.calls import DsmlCalls, FencedCalls, TaggedCalls
from saccade.chat.parser import AnswerParser
from saccade.chat.syntax import DEEPSEEK_V32, Syntax
from saccade.chat.types import CallDelta, ContentDelta, ReasoningDelta, UnparsedDelta

GLM = Syntax(has_reasoning=True, calls=TaggedCalls(), drops_breaks=True)
OLDER = Syntax(has_reasoning=True, calls=FencedCalls())
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}}}}}]
PARTS = {
    GLM: ["<tool_call>", "f", "\n", "<arg_key>", "s", "</arg_key>", "<arg_value>", "3", "</arg_value>", "</tool_call>"],
    DEEPSEEK_V32: ["<｜DSML｜function_calls>", "\n\n", '<｜DSML｜invoke name="f">', '<｜DSML｜parameter name="s" string="true">', "x", "</｜DSML｜parameter>", "</｜DSML｜invoke>", "</｜DSML｜function_calls>"],
    OLDER: ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "f", "<｜tool▁sep｜>", '{"s": 1}', "{", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
}  # fmt: skip


def read(
    syntax: Syntax, pieces: Sequence[str], prompt: str = "", tools: Any = TOOLS, is_cut: bool = False
) -> tuple[str, str, list[Any], str]:
    """Reasoning, content, calls, and what is no call."""
    parser = AnswerParser(syntax, prompt, tools, lambda: "id")
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish(is_cut)
    assert parser.finish() == []
    calls = [delta for delta in deltas if isinstance(delta, CallDelta)]
    assert [call.index for call in calls] == list(range(len(calls)))
    texts = [
        "".join(d.text for d in deltas if isinstance(d, kind)) for kind in (ReasoningDelta, ContentDelta, UnparsedDelta)
    ]
    return texts[0], texts[1], [(call.name, call.arguments) for call in calls], texts[2]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_cut_gives_the_same(data: st.DataObject) -> None:
    syntax = data.draw(st.sampled_from([GLM, DEEPSEEK_V32, OLDER]))
    words = [*PARTS[syntax], *PARTS[syntax], "<think>", "</think>", " ", "é", "<"]
    in_order = data.draw(st.booleans())
    text = "".join(PARTS[syntax] * 2 if in_order else []) + "".join(
        data.draw(st.lists(st.sampled_from(words), max_size=14))
    )
    prompt = data.draw(st.sampled_from(["", "<think>", "</think>"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(syntax, [text], prompt)
    assert read(syntax, pieces, prompt) == read(syntax, list(text), prompt) == whole


@pytest.mark.parametrize("syntax", PARTS, ids=["glm", "v3.2", "v3.1"])
def test_without_tools_there_are_no_calls(syntax: Syntax) -> None:
    text = "".join(PARTS[syntax])
    assert read(syntax, list(text), "</think>", ()) == ("", text, [], "")


def test_a_marker_that_is_only_talked_about_is_text() -> None:
    """At once, not at the end of the answer."""
    parser = AnswerParser(GLM, "</think>", TOOLS)
    for text in (
        "Use <tool_call> to call. ",
        "Or <tool_call>: so.",
        "And <tool_call>a b</tool_call>!",
        "<tool_call> 'x'",
    ):
        shown = "".join(delta.text for delta in parser.feed(text) if isinstance(delta, ContentDelta))
        assert shown.strip() == text.strip()
    assert read(DEEPSEEK_V32, ["A <｜DSML｜function_calls> block."])[1] == "A <｜DSML｜function_calls> block."
    assert read(OLDER, ["A <｜tool▁calls▁begin｜> block."])[1] == "A <｜tool▁calls▁begin｜> block."


def test_text_is_told_as_soon_as_it_is_certain() -> None:
    parser = AnswerParser(GLM, "<think>", TOOLS)
    assert parser.feed("hm <") == [ReasoningDelta("hm ")]
    assert parser.feed("b></thi") == [ReasoningDelta("<b>")]
    assert parser.feed("nk>\n\nSo") == [ContentDelta("So")]
    assert parser.feed(" it is.\n") == [ContentDelta(" it is.")]
    assert parser.feed("<tool_call>f</tool_call>")[0].__class__ is CallDelta
    assert parser.feed("\n") + parser.finish() == [ContentDelta("\n")]


def test_a_call_that_is_cut_off_is_none_and_its_text_is_told() -> None:
    text = "".join(PARTS[GLM][:-1])
    assert read(GLM, ["A.\n", text]) == ("", "A.", [], text)
    text = "<tool_call>f<arg_key>s</tool_call>"
    assert read(GLM, [text + "So."]) == read(GLM, [*text, "So."]) == ("", "So.", [], text)
    text = "".join(PARTS[DEEPSEEK_V32][2:5])
    found = read(DEEPSEEK_V32, ["".join(PARTS[DEEPSEEK_V32][:-1]), text])
    assert found == ("", "", [("f", '{"s": "x"}')], text)
    broken = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"s": <｜tool▁call▁end｜>'
    good = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"s": 1}<｜tool▁call▁end｜>'
    found = read(OLDER, [OLDER.calls.begin + broken + good + "<｜tool▁calls▁end｜>"])  # type: ignore[union-attr]
    assert found == ("", "", [("f", '{"s": 1}')], broken)
    found = read(OLDER, [OLDER.calls.begin + good + "what?" + good + "so"])  # type: ignore[union-attr]
    assert found == ("", "", [("f", '{"s": 1}')] * 2, "what?so")


@pytest.mark.parametrize("syntax", PARTS, ids=["glm", "v3.2", "v3.1"])
def test_half_a_marker_is_no_text_where_a_limit_cut_the_answer(syntax: Syntax) -> None:
    """Wherever the limit is, in pieces and whole. Without one, half a marker is text: the model has ended there."""
    text = "hm</think>So.\n\n" + "".join(part for part in PARTS[syntax] if part not in ("{", "\n"))
    for end in range(len(text)):
        found = read(syntax, [text[:end]], "<think>", is_cut=True)
        assert found == read(syntax, list(text[:end]), "<think>", is_cut=True)
        reasoning, content, calls, unparsed = found
        assert reasoning == text[: min(end, 2)]
        assert content == (text[10:end] if end <= 15 else "So.")
        assert unparsed == text[2:end] if end < 10 else (bool(unparsed or calls) == (end > 15)), end
    assert read(syntax, ["So. <"], is_cut=True)[1] in ("So.", "So. ") and read(syntax, ["So. <"])[1] == "So. <"
    assert read(syntax, ["So. <"], tools=(), is_cut=True)[1] == "So. <"  # no call can come
    assert read(syntax, ["<thi"], is_cut=True) == ("", "", [], "<thi") and read(syntax, ["<thi"])[1] == "<thi"


def test_text_around_calls_keeps_its_line() -> None:
    call = "<tool_call>f</tool_call>"
    assert read(GLM, [f"One.\n{call}\nTwo."])[1] == "One.\nTwo."
    assert read(GLM, [f"{call}\n\nTwo."])[1] == "Two."
    assert read(GLM, ["  indented\n"])[1] == "  indented\n"


def test_a_marker_that_the_model_repeats_opens_nothing_twice() -> None:
    for prompt, text in (("<think>", "<think>a</think>b"), ("", "\n<think>a</think>b"), ("<think>\n", "a</think>b")):
        assert read(GLM, list(text), prompt)[:2] == ("a", "b")
    assert read(GLM, ["<thin air"])[:2] == ("", "<thin air")
    assert read(Syntax(calls=TaggedCalls()), ["<think>a</think>b"])[1] == "<think>a</think>b"
    assert read(Syntax(has_reasoning=True, calls=DsmlCalls()), ["b"], "<think>")[0] == "b"


def test_blanks_around_a_listed_value_are_not_its_own() -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {"enum": ["x", " y"]}, "b": {"type": "string"}}}}
    keys = (("a", "\n x "), ("a", " y"), ("a", " z "), ("b", " x "))
    for key, raw in keys:
        text = f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{raw}</arg_value></tool_call>"
        ((_, arguments),) = read(GLM, [text], tools=[{"type": "function", "function": tool}])[2]
        assert json.loads(arguments) == {key: "x" if raw == "\n x " else raw}
