"""What answers are held to: the grammars, by the answers of models that canitoolcall has, and by what they must refuse."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from canitoolcall.fixtures import Fixture
from told_calls import CASES, SYNTAXES, find_prompt, parse

from saccade.chat.calls import FencedCalls, TaggedCalls
from saccade.chat.rules import constrain_answer
from saccade.chat.syntax import DEEPSEEK_V32, Syntax
from saccade.chat.types import ChatOptions
from saccade.engine.sampling.grammar import complete_tag
from saccade.errors import RequestError

xgrammar = pytest.importorskip("xgrammar")
from xgrammar.testing import _is_grammar_accept_string as is_accepted  # noqa: E402

# Not as their models write calls, though parsers bear with them: cut off, a closing marker left out, blanks before.
ODD = {
    "deepseek/sglang-v4-self-closing-invoke", "deepseek/v32-truncated-second-parallel-call",
    "deepseek/v4-truncated-second-parallel-call", "glm/glm47-vllm-whitespace-only-content",
    "glm/glm47-missing-last-close-arg-value", "deepseek/vllm-v3-parallel-no-newline",
}  # fmt: skip
GLM = Syntax(has_reasoning=True, calls=TaggedCalls(), drops_breaks=True)
OLDER = Syntax(has_reasoning=True, calls=FencedCalls())
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, NOW)]
CALLS = {
    DEEPSEEK_V32: (
        '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n',
        '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n',
    ),
    GLM: ("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>", "<tool_call>now</tool_call>"),
    OLDER: ('<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>', "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
}  # fmt: skip
AROUND = {
    DEEPSEEK_V32: ("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    GLM: ("", ""),
    OLDER: ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
}


def compile_rule(
    syntax: Syntax, prompt: str, options: ChatOptions, constraint: Any = None, tools: Any = TOOLS
) -> Callable[[str], bool]:
    held = constrain_answer(syntax, prompt, tools, options, constraint)
    tag = complete_tag(json.dumps(held["structural_tag"]))
    grammar = xgrammar.Grammar.from_structural_tag(xgrammar.StructuralTag.from_json(tag))
    return lambda text: bool(is_accepted(grammar, text))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_models_write_as_calls_is_what_they_are_held_to(case: Fixture) -> None:
    found, syntax, prompt = parse(case, [case.raw_output]), SYNTAXES[case.reference_model], find_prompt(case)
    if not found.tool_calls or not case.tools or found.content or case.id in ODD:
        return
    text = case.raw_output
    for end in ("<|user|>", "<|observation|>", "<｜end▁of▁sentence｜>"):
        text = text.removesuffix(end)
    names = {call.name for call in found.tool_calls}
    assert compile_rule(syntax, prompt, ChatOptions(tool_choice="required"), tools=case.tools)(text)
    is_alone = len(found.tool_calls) == 1
    assert compile_rule(syntax, prompt, ChatOptions(parallel_tool_calls=False), tools=case.tools)(text) == is_alone
    others = [tool for tool in [*case.tools, *TOOLS] if tool["function"]["name"] not in names]
    assert not compile_rule(syntax, prompt, ChatOptions(tool_choice="required"), tools=others)(text)


def join_calls(syntax: Syntax, *calls: str) -> str:
    begin, end = AROUND[syntax]
    return begin + "".join(calls) + end


@pytest.mark.parametrize("syntax", CALLS, ids=["v3.2", "glm", "v3.1"])
def test_each_choice_allows_what_it_says_and_nothing_else(syntax: Syntax) -> None:
    weather, now = CALLS[syntax]
    one, two = join_calls(syntax, weather), join_calls(syntax, weather, now)
    required = compile_rule(syntax, "<think>", ChatOptions(tool_choice="required"))
    assert all(map(required, (f"hm</think>{one}", f"</think>\n\n{two}")))
    assert not any(map(required, (one, "hm</think>", f"hm</think>So: {one}", f"hm</think>{one} So.", "hm")))
    named = ChatOptions(tool_choice="required", allowed_tools=("now",), parallel_tool_calls=False)
    is_named = compile_rule(syntax, "</think>", named)
    assert is_named(join_calls(syntax, now)) and not any(
        map(is_named, (one, join_calls(syntax, now, now), f"hm</think>{join_calls(syntax, now)}"))
    )
    single = compile_rule(syntax, "</think>", ChatOptions(parallel_tool_calls=False))
    assert all(map(single, ("So.", "", f"So.\n{one}"))) and not single(two)
    either = compile_rule(syntax, "", ChatOptions(), ("json_schema", {"type": "integer"}))
    assert all(map(either, ("12", f"<think>hm</think>{one}", two))) and not any(map(either, ("x", "12 x", "")))
    only = compile_rule(syntax, "<think>", ChatOptions(tool_choice="none"), ("regex", "[a-c]+"))
    assert only("hm</think>abc") and not any(map(only, ("abc", f"hm</think>{one}")))


def test_schemas_of_tools_are_kept_where_they_can_be() -> None:
    def make(**more: Any) -> Any:
        schema = {"type": "object", "properties": {"n": {"type": "integer"} | more.pop("n", {})}, "required": ["n"]}
        return [{"type": "function", "function": {"name": "f", "parameters": schema, **more}}]

    def write(value: str) -> str:
        return f"<tool_call>f<arg_key>n</arg_key><arg_value>{value}</arg_value></tool_call>"

    required = ChatOptions(tool_choice="required")
    for more, is_kept in (
        ({}, True),
        ({"strict": True}, True),
        ({"strict": False}, False),
        ({"n": {"not": {}}}, False),
    ):
        rule = compile_rule(GLM, "</think>", required, tools=make(**more))
        assert rule(write("3")) and rule(write("three")) != is_kept, more
    with pytest.raises(RequestError, match="^tools: f is strict, and its parameters, /properties/n: not cannot be"):
        constrain_answer(GLM, "", make(strict=True, n={"not": {}}), ChatOptions())
    free = compile_rule(GLM, "</think>", ChatOptions(), tools=make(strict=True))  # strict without being required
    assert free("So. " + write("3")) and not free(write("three"))
    none = compile_rule(GLM, "</think>", required, tools=[{"type": "function", "function": {"name": "f"}}])
    assert none("<tool_call>f</tool_call>") and not none(write("3"))  # no parameters are none
    broken = [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}]
    assert compile_rule(GLM, "</think>", required, tools=broken)(write("three"))


def test_reasoning_has_room_before_what_must_match() -> None:
    held = constrain_answer(GLM, "<think>", [], ChatOptions(reasoning_limit=5))
    assert json.dumps(held).count('"max_tokens": 5') == 1
    assert constrain_answer(GLM, "</think>", [], ChatOptions(reasoning_limit=5)) == {}
    asked = ("json_schema", '{"type": "object"}')
    assert constrain_answer(GLM, "</think>", [], ChatOptions(), asked) == dict([asked])  # as it came
    assert constrain_answer(DEEPSEEK_V32, "</think>", TOOLS, ChatOptions()) == {}
    assert compile_rule(GLM, "<think>", ChatOptions(), asked, tools=[])("hm</think>\n{}")


def test_what_cannot_be_held_is_refused() -> None:
    for tools, options, text in (
        ([], ChatOptions(tool_choice="required"), "tool_choice: a call that must come needs tools"),
        (TOOLS, ChatOptions(allowed_tools=("x",)), "tool_choice: there is no tool 'x' in tools"),
        (TOOLS, ChatOptions(tool_choice="now"), "tool_choice: expected one of auto, none, required, found 'now'"),
    ):
        with pytest.raises(RequestError) as caught:
            constrain_answer(GLM, "", tools, options)
        assert str(caught.value) == text
    with pytest.raises(RequestError, match="^tool_choice: this model's chat format has no calls"):
        constrain_answer(Syntax(), "", TOOLS, ChatOptions(tool_choice="required"))
    assert constrain_answer(Syntax(), "", TOOLS, ChatOptions(parallel_tool_calls=False)) == {}
