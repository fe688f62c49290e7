"""The `anthropic` package, unchanged: messages, streams, tools, thinking, counts, errors."""

import anthropic
import pytest
from served_model import ServedModel

TOOL = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASK = {"role": "user", "content": "What's the weather in Paris right now? Use the tool."}
THINK = {"role": "user", "content": "9.11 or 9.9: which is larger?"}
RECORD = {"name": "record_answer", "input_schema": {"type": "object", "properties": {"answer": {"type": "string"}}}}


def connect(served: ServedModel) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def test_messages_and_tools(scripted: ServedModel) -> None:
    client = connect(scripted)
    ask = {"model": "scripted", "max_tokens": 100, "tools": [TOOL], "system": "Be short."}
    made = client.messages.create(**ask, messages=[ASK])
    (call,) = made.content
    assert (call.type, call.name, call.input, made.stop_reason) == (
        "tool_use",
        "get_weather",
        {"city": "Paris"},
        "tool_use",
    )
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temp_c": 18}'}
    talk = [ASK, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    told = client.messages.create(**ask, messages=talk)
    assert (told.content[0].text, told.stop_reason) == ("It is 18 degrees and clear in Paris.", "end_turn")
    counted = client.messages.count_tokens(model="scripted", messages=talk, tools=[TOOL], system="Be short.")
    assert counted.input_tokens == told.usage.input_tokens > 0


def test_streams(scripted: ServedModel) -> None:
    client = connect(scripted)
    ask = {"model": "scripted", "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    with client.messages.stream(**ask, messages=[THINK], tools=[RECORD]) as stream:
        kinds = [event.type for event in stream]
        made = stream.get_final_message()
    assert [block.type for block in made.content] == ["thinking", "tool_use"]
    assert (made.content[0].thinking, made.content[1].input) == ("9.9 is larger.", {"answer": "9.9"})
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and made.usage.output_tokens > 0
    with client.messages.stream(model="scripted", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]) as stream:
        assert "".join(stream.text_stream) == "Hello!"


def test_errors(scripted: ServedModel) -> None:
    client = connect(scripted)
    assert [model.id for model in client.models.list()] == ["scripted"]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=[ASK])
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="scripted", max_tokens=5, messages=[{"role": "boss", "content": ""}])
