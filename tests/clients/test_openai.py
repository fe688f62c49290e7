"""The `openai` package, unchanged: completions, chats, streams, log-probabilities, tools, schemas, errors."""

import json
from pathlib import Path

import openai
import pytest
from served_model import ANSWER, QUESTION, ServedModel

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "What's the weather in Paris right now? Use the tool."}]
BUNDLED, SCRIPTED = "saccade-bundled", "scripted"


def connect(served: ServedModel) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_completions(bundled: ServedModel) -> None:
    client = connect(bundled)
    assert [model.id for model in client.models.list()] == [BUNDLED]
    whole = client.completions.create(model=BUNDLED, prompt=QUESTION, max_tokens=40, logprobs=2)
    choice = whole.choices[0]
    assert (choice.text, choice.finish_reason, whole.usage.completion_tokens) == (ANSWER, "stop", 13)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == 13
    pieces = client.completions.create(model=BUNDLED, prompt=QUESTION, max_tokens=40, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == ANSWER
    echo = client.completions.create(model=BUNDLED, prompt=QUESTION, max_tokens=0, echo=True, logprobs=0)
    assert echo.choices[0].text == QUESTION and len(echo.choices[0].logprobs.token_logprobs) == 20


def test_a_chat_with_log_probabilities(bundled: ServedModel) -> None:
    client = connect(bundled)
    ask = {"model": BUNDLED, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "seed": 3}
    wild = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, n=2, temperature=20.0)
    assert [len(choice.logprobs.content) for choice in wild.choices] == [12, 12]
    assert wild.choices[0].message.content != wild.choices[1].message.content
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = client.chat.completions.create(**ask).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 12


def test_a_schema_is_kept(bundled: ServedModel) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["answer", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    ask = [{"role": "user", "content": "Yes or no?"}]
    for seed in range(2):
        made = connect(bundled).chat.completions.create(
            model=BUNDLED, messages=ask, response_format=form, temperature=1.0, seed=seed, max_tokens=400
        )
        found = json.loads(made.choices[0].message.content)
        assert found["answer"] in ("yes", "no") and found["count"] in (1, 2, 3), found


def test_tools(scripted: ServedModel) -> None:
    client = connect(scripted)
    whole = client.chat.completions.create(model=SCRIPTED, messages=ASK, tools=[TOOL])
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert whole.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model=SCRIPTED, messages=ASK, tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temp_c": 18}'}
    talk = [*ASK, whole.choices[0].message, result]
    told = client.chat.completions.create(model=SCRIPTED, messages=talk, tools=[TOOL])
    assert told.choices[0].message.content == "It is 18 degrees and clear in Paris."


def test_responses(scripted: ServedModel) -> None:
    client = connect(scripted)
    tool = {"type": "function", **TOOL["function"], "strict": None}
    assert client.responses.create(model=SCRIPTED, input="Hi").output_text == "Hello!"
    made = client.responses.create(model=SCRIPTED, input=ASK, tools=[tool])
    assert [item.type for item in made.output] == ["function_call"]
    with client.responses.stream(model=SCRIPTED, input=ASK, tools=[tool]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.output[0].arguments == made.output[0].arguments and "response.completed" in kinds
    output = {"type": "function_call_output", "call_id": made.output[0].call_id, "output": '{"temp_c": 18}'}
    told = client.responses.create(model=SCRIPTED, input=[*ASK, *made.output, output], tools=[tool])
    assert told.output_text == "It is 18 degrees and clear in Paris."


def test_the_example_of_the_page_on_serving(bundled: ServedModel, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("http://127.0.0.1:8000", bundled.url), {})
    assert capsys.readouterr().out.count("#### 19") == 4


def test_errors(bundled: ServedModel) -> None:
    client = connect(bundled)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=BUNDLED, prompt="a", max_tokens=10**6)
    assert "max_tokens" in error.value.body["message"]
