"""The encoding of DeepSeek-V3.2, byte for byte.

`encoded_v32.json`: conversations of ours, and what another project's encoder, of mlx-lm 0.32.2, makes of them. SGLang's,
as llm-router-utils 0.8.1 ships it, agrees but for the blank lines in the instructions on tools, which it has lost.
The model's repository publishes pairs of its own: with SACCADE_V32_PAIRS=DIRECTORY, a copy of its folder `encoding`,
they are compared too.
"""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from saccade.chat.deepseek import DeepSeekFormat
from saccade.chat.types import CallDelta, ChatOptions, ContentDelta, ReasoningDelta
from saccade.errors import RequestError

ENCODED = json.loads((Path(__file__).parent / "encoded_v32.json").read_text("utf-8"))
PAIRS = os.environ.get("SACCADE_V32_PAIRS")
PUBLISHED = ("test_output.txt", "test_output_search_wo_date.txt", "test_output_search_w_date.txt")
KNOWN = {"test_output.txt": "c1e77cd59dc7be9db2541061774a358e3fcb49e7a4cdfcd3b0f3a7058134bede"}
FORMAT = DeepSeekFormat()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}


@pytest.mark.parametrize("case", ENCODED, ids=lambda case: f"{case['name']}{', thinking' * case['thinking']}")
def test_prompts_are_those_of_another_encoder(case: dict[str, Any]) -> None:
    assert FORMAT.render(case["messages"], (), ChatOptions(thinking=case["thinking"])) == case["prompt"]


@pytest.mark.skipif(PAIRS is None, reason="needs a copy of the published pairs")
@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_the_published_ones(name: str) -> None:
    raw = (Path(PAIRS or "") / name).read_bytes()
    assert sha256(raw).hexdigest() == KNOWN.get(name, sha256(raw).hexdigest()), "another version of the pairs"
    asked = json.loads(
        (Path(PAIRS or "") / name.replace("output", "input").replace(".txt", ".json")).read_text("utf-8")
    )
    found = FORMAT.render(asked["messages"], asked.get("tools"), ChatOptions(thinking=True))
    assert found == raw.decode("utf-8").strip("\n")


def chat(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]


def call(id: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": id, "function": {"name": "f", "arguments": arguments}}]}


def test_what_clients_send_otherwise_gives_the_same_prompt() -> None:
    plain = FORMAT.render(chat("system", "user"), [TOOL], ChatOptions(thinking=True))
    for name in ("thinking", "enable_thinking"):
        assert FORMAT.render(chat("system", "user"), [TOOL], ChatOptions(variables={name: True})) == plain
    system, user = chat("system", "user")
    assert (
        FORMAT.render([system | {"role": "developer"}, user], [TOOL["function"]], ChatOptions(thinking=True)) == plain
    )
    parts = [{"type": "text", "text": "user"}, {"type": "text", "text": " 1"}]
    assert (
        FORMAT.render([system | {"tools": [TOOL]}, user | {"content": parts}], (), ChatOptions(thinking=True)) == plain
    )
    assert plain.endswith("<｜User｜>user 1<｜Assistant｜><think>")
    assert FORMAT.render([user], [TOOL]) == FORMAT.render([{"role": "system", "content": ""}, user], [TOOL])


def test_results_stand_in_the_order_of_their_calls() -> None:
    """The encoding has no ids: a result that comes first is taken for the first call's."""
    calls = call("one")["tool_calls"] + call("two")["tool_calls"]
    asked = [*chat("user"), {"role": "assistant", "tool_calls": calls}]
    results = [{"role": "tool", "content": id, "tool_call_id": id} for id in ("two", "one")]
    assert FORMAT.render([*asked, *results]) == FORMAT.render([*asked, *reversed(results)])
    assert "<result>one</result>\n<result>two</result>" in FORMAT.render([*asked, *results])


def test_an_answer_that_goes_on_stays_open() -> None:
    assert FORMAT.render(chat("user", "assistant"), (), ChatOptions(continues=True)).endswith("</think>assistant 1")
    with pytest.raises(RequestError, match="expected the last message to be the assistant's"):
        FORMAT.render(chat("user"), (), ChatOptions(continues=True))


def test_an_answer_is_opened_behind_a_system_message_too() -> None:
    assert FORMAT.render(chat("system")).endswith("system 0<｜Assistant｜></think>")
    assert FORMAT.render(chat("user", "system"), (), ChatOptions(thinking=True)).endswith("<｜Assistant｜><think>")


def test_what_is_rendered_is_read_back() -> None:
    """Reasoning, content and calls of an answer, however they are cut."""
    asked = [*chat("user"), call("x", n=3, text='a "b"\n<c>', deep={"k": [1.50, None]}) | {"content": "I do."}]
    asked[-1]["reasoning_content"] = "hm\nwell"
    prompt = FORMAT.render(asked[:1], [TOOL], ChatOptions(thinking=True))
    text = FORMAT.render(asked, [TOOL], ChatOptions(thinking=True, continues=True)).removeprefix(prompt)
    for size in (1, 2, 7, len(text)):
        parser = FORMAT.new_parser(prompt, [TOOL])
        pieces = [text[place : place + size] for place in range(0, len(text), size)]
        deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
        assert "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)) == "hm\nwell"
        assert "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)) == "I do."
        (found,) = [delta for delta in deltas if isinstance(delta, CallDelta)]
        assert (found.index, found.name) == (0, "f")
        assert json.loads(found.arguments) == {"n": 3, "text": 'a "b"\n<c>', "deep": {"k": [1.5, None]}}


def test_an_effort_is_a_way_to_ask_for_thinking() -> None:
    for options, is_on in (
        (ChatOptions(reasoning_effort="low"), True), (ChatOptions(reasoning_effort="none"), False),
        (ChatOptions(reasoning_effort="low", thinking=False), False), (ChatOptions(thinks_unasked=True), True),
        (ChatOptions(reasoning_effort="low", thinks_unasked=False), False),
    ):  # fmt: skip
        assert FORMAT.render(chat("user"), (), options).endswith("<think>") == is_on, options
    with pytest.raises(RequestError, match="^chat_template_kwargs: the format of DeepSeek-V3.2 has no variable 'x'"):
        FORMAT.render(chat("user"), (), ChatOptions(variables={"x": 1}))


def results(*ids: str | None) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": "?", "tool_call_id": id} for id in ids]


two = {"role": "assistant", "tool_calls": call("a")["tool_calls"] + call("b")["tool_calls"]}
BAD: dict[str, tuple[Any, Any, str]] = {
    "no list": ("hi", None, "messages: expected a list of objects with role and content, found 'hi'"),
    "none": ([], None, "messages: expected one at least, found an empty list"),
    "no object": (["hi"], None, "message 0: expected an object with role and content, found 'hi'"),
    "role": ([{"role": "me"}], None, "message 0: role: expected one of system, developer, user, assistant, tool, found 'me'"),
    "content": ([{"role": "user", "content": 3}], None, "message 0: expected content as text or a list of parts, found 3"),
    "image": ([{"role": "user", "content": [{"type": "image_url"}]}], None, "message 0: expected parts of text, found 'image_url'; the model reads text alone"),
    "arguments": ([*chat("user"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a}"}}]}], None, "message 1: call 0: expected arguments as a JSON object, found '{a}'"),
    "list of arguments": ([*chat("user"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], None, "message 1: call 0: expected arguments as a JSON object, found '[1]'"),
    "calls": ([*chat("user"), {"role": "assistant", "tool_calls": "f"}], None, "message 1: tool_calls: expected a list, found 'f'"),
    "call": ([*chat("user"), {"role": "assistant", "tool_calls": [3]}], None, 'message 1: call 0: expected {"function": {"name", "arguments"}}, found 3'),
    "result of nothing": (chat("user", "tool"), None, "message 1: the result of a tool, and no call before it waits for one"),
    "result at the begin": (chat("tool"), None, "message 0: the result of a tool, and no call before it waits for one"),
    "results in excess": ([*chat("user"), call("a"), *results("a", None)], None, "message 3: the result of a tool, and no call before it waits for one"),
    "another result": ([*chat("user"), call("a"), *results("b")], None, "message 2: expected the result of 'a', found one of 'b'"),
    "one result twice": ([*chat("user"), two, *results("a", "a")], None, "message 3: expected the result of 'b', found one of 'a'"),
    "results that are missing": ([*chat("user"), two, *results("b"), *chat("user")], None, "message 1: calls tools; expected a result of each call behind it, 1 missing"),
    "no results": ([*chat("user"), two, *chat("user")], None, "message 1: calls tools; expected a result of each call behind it, 2 missing"),
    "tool": (chat("user"), [{"type": "web"}], 'tool 0: expected {"type": "function", "function": {"name": ...}}, found {\'type\': \'web\'}'),
    "name of a tool": (chat("user"), [{"name": "a b"}], "tool 0: expected a name without blanks, quotes and <>{}, as calls are read, found 'a b'"),
    "tools": (chat("user"), "f", "tools: expected a list of objects, found 'f'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_one_line(name: str) -> None:
    messages, tools, text = BAD[name]
    with pytest.raises(RequestError) as found:
        FORMAT.render(messages, tools)
    assert str(found.value) == text


def test_two_names_of_the_switch_that_disagree_are_refused() -> None:
    options = ChatOptions(thinking=True, variables={"enable_thinking": False})
    with pytest.raises(RequestError, match="enable_thinking and thinking of the options disagree"):
        FORMAT.render(chat("user"), (), options)
    with pytest.raises(RequestError, match="thinking: expected true or false, found 'yes'"):
        FORMAT.render(chat("user"), (), ChatOptions(variables={"thinking": "yes"}))
    assert FORMAT.render(chat("user"), (), ChatOptions(reasoning_effort="none")).endswith("</think>")
