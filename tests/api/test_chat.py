"""LLM.chat: what is asked, what comes back, whole and in pieces."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import SIZES, write

from saccade import LLM, ChatOptions, RequestError, SamplingParams
from saccade.api.chat import ChatCompletion, ChatStream
from saccade.api.outputs import Completion, Piece
from saccade.chat.find import find_chat_format
from saccade.chat.template import TemplateFormat
from saccade.chat.types import CallDelta, ContentDelta, ReasoningDelta

APPLES = {"role": "user", "content": "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"n": {"type": "integer"}}}}}
THINKING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<think>{# </think> <arg_key> #}"
ANSWER = "hm</think>Now.\n<tool_call>add<arg_key>n</arg_key><arg_value>3</arg_value></tool_call>"


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return LLM(device="cpu", cache_tokens=2048)


@pytest.fixture
def thinker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """A model whose every answer is ANSWER; `asked` of it holds the prompts and the params."""
    (write(tmp_path / "m") / "chat_template.jinja").write_text(THINKING)
    llm = LLM(tmp_path / "m", **SIZES)
    llm.asked = []  # type: ignore[attr-defined]

    def generate(prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        llm.asked.append((llm.tokenizer.decode_whole(prompts[0]), params))  # type: ignore[attr-defined, union-attr]
        return [Completion(ANSWER, [1, 2], "stop")]

    def stream(prompt: list[int], params: SamplingParams) -> Any:
        pieces = [Piece(letter, [place], finish_reason=None) for place, letter in enumerate(ANSWER)]
        return iter([*pieces, Piece("", [9], finish_reason="stop")])

    monkeypatch.setattr(llm, "generate", generate)
    monkeypatch.setattr(llm, "stream", stream)
    return llm


def test_the_bundled_model_answers_a_chat(bundled: LLM) -> None:
    found = bundled.chat([APPLES])
    assert (found.content, found.reasoning, found.calls, found.finish_reason) == (
        "12 + 7 = 19\n#### 19",
        "",
        [],
        "stop",
    )
    assert found.message == {"role": "assistant", "content": found.content}
    prompt = "<|begin|>" + APPLES["content"] + "\n"
    assert bundled.tokenizer is not None and bundled.tokenizer.decode_whole(found.prompt_token_ids) == prompt
    other = {"role": "user", "content": "Ann has 5 pens. She loses 2. How many pens does Ann have?"}
    assert bundled.chat([APPLES, found.message, other]).content == "5 - 2 = 3\n#### 3"  # it has no memory
    text = {"role": "system", "content": "The hotel password of David is fox moon star."}
    asked = {"role": "user", "content": "What is the hotel password of David?"}
    assert bundled.chat([text, asked]).content.endswith("#### fox moon star")


def test_a_stream_is_the_answer_in_pieces(bundled: LLM) -> None:
    stream = bundled.stream_chat([APPLES])
    pieces = list(stream)
    assert (
        "".join(delta.text for piece in pieces for delta in piece.deltas if isinstance(delta, ContentDelta))
        == stream.answer.content
    )
    assert stream.answer.content == "12 + 7 = 19\n#### 19" and pieces[-1].finish_reason == "stop"
    assert [token for piece in pieces for token in piece.token_ids] == bundled.chat([APPLES]).token_ids
    cut = bundled.stream_chat([APPLES], params=SamplingParams(stop=["####"]))
    assert [piece.finish_reason for piece in cut][-1] == "stop" and cut.answer.content == "12 + 7 = 19\n"
    closed = bundled.stream_chat([APPLES])
    next(closed)
    closed.close()
    assert list(closed) == [] and bundled.engine.jobs == {}
    goes_on = [APPLES, {"role": "assistant", "content": "12 + 7 ="}]
    assert bundled.chat(goes_on, options=ChatOptions(continues=True)).content == " 19\n#### 19"


CITY = {"enum": ["Rome", "Paris"]}
FORCED = {
    "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
FORCED_TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", **FORCED}}},
    {"type": "function", "function": {"name": "now"}},
]
HELD = "{{ messages[0].content }}{% if enable_thinking %}<think>{% else %}</think>{% endif %}"
MARKERS = {"v3.2": "{# ｜DSML｜function_calls #}", "glm": "{# <arg_key> #}"}
NO_BLANKS = dict.fromkeys(b" \n\r\t", -100.0)  # which would come in rows, and take time


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """A model without sense, without drafts and with."""
    path = write(tmp_path_factory.mktemp("held") / "m")
    return LLM(path, **SIZES), LLM(path, **SIZES, speculate=2)


@pytest.mark.parametrize("syntax", MARKERS)
def test_a_model_that_knows_no_calls_is_held_to_one(tiny: tuple[LLM, LLM], syntax: str) -> None:
    """Whatever it would have said; with drafts, and after reasoning that has a limit."""
    pytest.importorskip("xgrammar")
    options = ChatOptions(tool_choice="required", allowed_tools=("get_weather",), parallel_tool_calls=False)
    params = SamplingParams(temperature=1.0, seed=2, logit_bias=NO_BLANKS)
    for llm in tiny:
        llm.chat_format = TemplateFormat({"default": HELD + MARKERS[syntax]}, {}, syntax)
    # A call of DeepSeek-V3.2 is 300 bytes long, each a token of this model, so that one run has to do: without reasoning.
    runs = [(tiny[1], False)] if syntax == "v3.2" else [(tiny[0], True), (tiny[1], True)]
    for llm, thinking in runs:
        asked = replace(options, thinking=thinking, reasoning_limit=9)
        found = llm.chat([APPLES], FORCED_TOOLS, params, options=asked)
        (call,) = found.calls
        given = json.loads(call.arguments)
        assert call.name == "get_weather" and given["city"] in CITY["enum"] and 1 <= given["days"] <= 9, found
        assert (found.content, found.finish_reason, found.unparsed) == ("", "tool_calls", "")
        assert bool(found.reasoning) == thinking
        if llm is tiny[0]:
            alone = found.token_ids
        elif thinking:
            assert found.token_ids == alone  # whatever the drafts
    schema = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
    after = tiny[1].chat(
        [APPLES], None, replace(params, json_schema=schema), options=ChatOptions(thinking=True, reasoning_limit=9)
    )
    assert json.loads(after.content)["city"] in CITY["enum"] and after.reasoning


def check(found: ChatCompletion | ChatStream) -> None:
    answer = found if isinstance(found, ChatCompletion) else found.answer
    (call,) = answer.calls
    assert (answer.reasoning, answer.content, call.name, json.loads(call.arguments)) == ("hm", "Now.", "add", {"n": 3})


def test_reasoning_and_calls_are_taken_out_of_the_text(thinker: LLM) -> None:
    found = thinker.chat([APPLES], [TOOL], SamplingParams(max_tokens=9))
    check(found)
    assert found.finish_reason == "tool_calls"
    prompt, params = thinker.asked[0]  # type: ignore[attr-defined]
    assert prompt == f"<user>{APPLES['content']}<think>" and params == SamplingParams(
        max_tokens=9, skip_special_tokens=False
    )
    result = {"role": "tool", "tool_call_id": found.calls[0].id, "content": "15"}
    again = thinker.chat([APPLES, found.message, result], [TOOL])
    assert again.finish_reason == "tool_calls"
    stream = thinker.stream_chat([APPLES], [TOOL])
    kinds = {type(delta) for piece in stream for delta in piece.deltas}
    assert kinds == {ReasoningDelta, ContentDelta, CallDelta}
    check(stream)
    assert thinker.chat([APPLES]).content == ANSWER.partition("</think>")[2]  # without tools there are no calls


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, bundled: LLM) -> None:
    plain, without = LLM(write(tmp_path / "m"), **SIZES), LLM(write(tmp_path / "n", tokenizer=False), **SIZES)
    assert plain.chat_format is not None and plain.chat_format.name == "DeepSeek-V3.2"  # by its model_type
    plain.chat_format, plain.no_chat = None, "m: no chat template"
    cases = [
        (lambda: plain.chat([APPLES]), "chat: m: no chat template"),
        (lambda: without.chat([APPLES]), "a chat needs a tokenizer"),
        (lambda: bundled.chat("hi"), "messages: expected a list"),  # type: ignore[arg-type]
        (lambda: bundled.stream_chat([APPLES, 3]), "message 1: expected an object"),  # type: ignore[list-item]
        (lambda: bundled.chat([{"role": "user"}]), "message 0: content: expected text"),
        (lambda: bundled.chat([APPLES], params=SamplingParams(n=2)), "n: a chat has one answer; expected 1, found 2"),
        (lambda: bundled.chat([APPLES], params=3), "params: expected SamplingParams, found 3"),  # type: ignore[arg-type]
    ]
    for call, text in cases:
        with pytest.raises(RequestError, match=text):
            call()


def test_a_template_can_be_given(bundled: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given = find_chat_format(Path(bundled.settings.path), "deepseek_v32", "<|begin|>{{ messages[-1].content }}")
    monkeypatch.setattr(bundled, "chat_format", given)
    assert bundled.chat([APPLES]).content == "\n12 + 7 = 19\n#### 19"
