"""Every API in front of an engine whose answers are written: what is asked becomes a prompt, what comes its shape."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from api_client import Client
from served_model import read_events

from saccade.chat.template import DEFAULT, TemplateFormat
from saccade.errors import ConfigError, RequestError
from saccade.server.engine.wire import Counts, Delta

CALL = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
THOUGHT = "I must look.</think>It rains."
FUNCTION = {
    "name": "get_weather",
    "description": "",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
HELLO = [{"role": "user", "content": "Hello"}]


def read_named(told: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream whose events have names; each name is the event's own."""
    names = [line.removeprefix("event: ") for line in told.text.splitlines() if line.startswith("event: ")]
    events = [json.loads(event) for event in read_events(told.text)]
    assert names == [event["type"] for event in events]
    return events


def gather(chunks: Sequence[Any], name: str) -> str:
    return "".join(chunk["choices"][0]["delta"].get(name) or "" for chunk in chunks if chunk["choices"])


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_chat_with_reasoning_and_a_call_is_the_same_in_pieces_of_any_size(size: int) -> None:
    client = Client("I must look.</think>\n\n" + CALL, size)
    body = {"messages": HELLO, "tools": TOOLS, "thinking": {"type": "enabled"}}
    whole = client.post("/v1/chat/completions", body).json()
    choice = whole["choices"][0]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "I must look.")
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
    assert choice["finish_reason"] == "tool_calls" and client.prompt.endswith("<think>")
    assert "get_weather" in client.prompt and not client.engine.params[-1].skip_special_tokens
    told = client.post("/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    *events, done = read_events(told.text)
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]" and chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (gather(chunks, "content"), gather(chunks, "reasoning_content")) == ("", "I must look.")
    calls = [
        call for chunk in chunks if chunk["choices"] for call in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert [(c["index"], c["type"], c["function"]) for c in calls] == [(0, "function", call["function"])]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "tool_calls"
    assert chunks[-1]["usage"] == whole["usage"] and whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_the_thinking_switch_under_each_name_and_tool_choice() -> None:
    client = Client(THOUGHT)
    for field, is_on in (
        ({"thinking": True}, True), ({"enable_thinking": True}, True), ({"thinking": {"type": "disabled"}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True), ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"thinking": True, "response_format": {"type": "text"}}, True), ({"response_format": {"type": "json_object"}}, False),
    ):  # fmt: skip
        answer = client.post("/v1/chat/completions", {"messages": HELLO, **field}).json()
        assert client.prompt.endswith("<think>") == is_on, field
        assert ("reasoning_content" in answer["choices"][0]["message"]) == is_on
    assert client.engine.params[-1].constraint == ("json_schema", '{"type": "object"}')
    both = {"messages": HELLO, "thinking": True, "response_format": {"type": "json_object"}}
    assert client.post("/v1/chat/completions", both).status_code == 200  # reasoning first, then JSON
    name, text = client.engine.params[-1].constraint or ("", "")
    assert name == "structural_tag" and '"end": "</think>"' in text and '{"type": "object"}' in text
    template = TemplateFormat(
        {DEFAULT: "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"}, {}, "one"
    )
    client = Client(THOUGHT, chat=template)  # of a model that thinks unless it is told not to
    for field, is_on in (({}, True), ({"enable_thinking": False}, False)):
        client.post("/v1/chat/completions", {"messages": HELLO, **field})
        assert client.prompt.endswith("<think>") == is_on
    client = Client(CALL)
    client.post("/v1/chat/completions", {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"})
    assert "get_weather" not in client.prompt
    told = client.post("/v1/chat/completions", {"messages": HELLO, "tool_choice": "required"})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "tool_choice")


def test_a_call_that_was_cut_off_leaks_nowhere() -> None:
    client = Client(CALL[:90], reason="length")
    message = client.post("/v1/chat/completions", {"messages": HELLO, "tools": TOOLS}).json()["choices"][0]
    assert (message["message"]["content"], message["finish_reason"]) == ("", "length")
    assert message["message"]["unparsed"].startswith("<｜DSML｜") and "tool_calls" not in message["message"]
    told = client.post("/v1/chat/completions", {"messages": HELLO, "tools": TOOLS, "stream": True})
    chunks = [json.loads(event) for event in read_events(told.text)[:-1]]
    assert gather(chunks, "content") == "" and gather(chunks, "unparsed") == message["message"]["unparsed"]


def test_logprobs_of_a_chat_go_with_its_tokens() -> None:
    client = Client()
    rows = [(72, -0.5, [(72, -0.5), (105, -1.0)]), (105, -0.25, [(105, -0.25), (72, -2.0)])]
    client.engine.script = lambda tokens, params: [
        Delta([72], "<", rows[:1]), Delta([105], "i", rows[1:], "stop", None, Counts(2, 5, 3)),
    ]  # fmt: skip
    # With tools, text that could begin a call is held back, and its token's numbers with it.
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "tools": TOOLS}
    whole = client.post("/v1/chat/completions", body).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["<i", "<i"]
    content = whole["choices"][1]["logprobs"]["content"]
    assert [(row["token"], row["bytes"], row["logprob"]) for row in content] == [("H", [72], -0.5), ("i", [105], -0.25)]
    assert [[top["token"] for top in row["top_logprobs"]] for row in content] == [["H", "i"], ["i", "H"]]
    details = whole["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (6, 4)
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    told = client.post("/v1/chat/completions", body | {"stream": True})
    found = {0: [], 1: []}  # type: ignore[var-annotated]
    for event in read_events(told.text)[:-1]:
        choice = json.loads(event)["choices"][0]
        found[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert found == {0: content, 1: content}
    assert client.engine.params[-1].logprobs == 2


def test_messages_of_anthropic_whole_and_in_events() -> None:
    client = Client("I must look.</think>Wait.\n\n" + CALL)
    tools = [{"name": "get_weather", "description": "", "input_schema": FUNCTION["parameters"]}]
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "It rains."}]}
    talk = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": [{"type": "text", "text": "See."}, {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [result, {"type": "text", "text": "And in Paris?"}]},
    ]  # fmt: skip
    body = {
        "max_tokens": 50,
        "messages": talk,
        "tools": tools,
        "system": [{"type": "text", "text": "Be short."}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    whole = client.post("/v1/messages", body).json()
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert (whole["content"][1]["text"], whole["content"][2]["input"]) == ("Wait.", {"city": "Paris"})
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "tool_use")
    for part in ("Be short.", "Rome", "It rains.", "And in Paris?"):
        assert part in client.prompt
    counted = client.post("/v1/messages/count_tokens", {k: v for k, v in body.items() if k != "max_tokens"}).json()
    assert counted["input_tokens"] == whole["usage"]["input_tokens"] == len(client.engine.prompts[-1])
    events = read_named(client.post("/v1/messages", body | {"stream": True}))
    assert (events[0]["type"], events[-2]["type"], events[-1]["type"]) == (
        "message_start",
        "message_delta",
        "message_stop",
    )
    blocks: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for name, field in (("text", "text"), ("thinking", "thinking"), ("partial_json", "json")):
                block[field] = block.get(field, "") + delta.get(name, "")
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert (blocks[0]["thinking"], blocks[1]["text"], json.loads(blocks[2]["json"])) == (
        "I must look.",
        "Wait.",
        {"city": "Paris"},
    )
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert client.post("/v1/messages", body | {"max_tokens": 10**6}).status_code == 200  # cut to what has room
    assert client.engine.params[-1].max_tokens == 4096 - len(client.engine.prompts[-1])


def test_responses_whole_and_in_events() -> None:
    client = Client("I must look.</think>Wait.\n\n" + CALL)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "How is the weather?"}]},
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "a", "output": "It rains."},
    ]
    body = {
        "input": items,
        "instructions": "Be short.",
        "tools": [{"type": "function", **FUNCTION}],
        "chat_template_kwargs": {"thinking": True},
    }
    whole = client.post("/v1/responses", body).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][1]["content"][0]["text"] == "Wait." and whole["status"] == "completed"
    assert json.loads(whole["output"][2]["arguments"]) == {"city": "Paris"}
    events = read_named(client.post("/v1/responses", body | {"stream": True}))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]["response"]
    strip = lambda output: [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in output]  # noqa: E731
    assert strip(final["output"]) == strip(whole["output"]) and final["usage"] == whole["usage"]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "Wait." and client.post("/v1/responses", {"input": "Hello"}).json()["status"] == "completed"
    assert client.post("/v1/responses", {"input": "Hello", "previous_response_id": "x"}).status_code == 400


def test_echo_and_the_scores_of_a_prompt() -> None:
    client = Client()
    tokens = client.post("/tokenize", {"prompt": "Tom has"}).json()["tokens"]
    assert client.post("/tokenize", {"prompt": "Tom has", "add_special_tokens": False}).json()["tokens"] == tokens[1:]
    rows = [(token, -float(i), [(token, -float(i))]) for i, token in enumerate(tokens[1:], 1)]
    last = [(72, -0.5, [(105, -0.25)])]
    client.engine.script = lambda tokens, params: [Delta([72], "H", last, "length", None, Counts(), rows)]
    body = {"prompt": "Tom has", "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = client.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "Tom hasH" and client.engine.params[-1].prompt_logprobs == 1
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"Tom": -1.0}, {" has": -2.0}, {"i": -0.25, "H": -0.5}]
    whole = client.post("/v1/completions", body | {"max_tokens": 0}).json()
    assert (whole["choices"][0]["text"], whole["usage"]["completion_tokens"]) == ("Tom has", 0)
    assert whole["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert client.post("/v1/completions", {"prompt": "a", "max_tokens": 0}).status_code == 400
    assert client.send("GET", "/tokenizer_info").json()["eos_token"] == "<|end|>"


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"}"
BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", b"{", 400, "no JSON"), ("/v1/completions", b'{"prompt": "\xff"}', 400, "byte 12 is no UTF-8"),
    ("/v1/completions", b'{"prompt": "a", "top_p": NaN}', 400, "NaN"), ("/v1/completions", DEEP, 400, "too deep"),
    ("/v1/completions", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "digits"),
    ("/v1/completions", {"prompt": "a", "temperature": 1e999}, 400, ""), ("/v1/completions", {"prompt": "a", "temperature": "1"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"), ("/v1/completions", {"prompt": "a", "max_tokens": 1.0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "n": True}, 400, "n: "), ("/v1/completions", {"prompt": "a", "n": 10**9}, 400, "n: "),
    ("/v1/completions", {}, 400, "prompt"), ("/v1/completions", {"prompt": ["a", 1]}, 400, "prompt"), ("/v1/completions", {"prompt": [[]]}, 400, "prompt"),
    ("/v1/completions", [], 400, "body"), ("/v1/completions", {"prompt": "a", "model": "b"}, 404, "'b'"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of"), ("/v1/completions", {"prompt": "\ud800"}, 400, "encoded"),
    ("/v1/completions", {"prompt": "a", "stop": ["b"] * 100}, 400, "stop"), ("/v1/completions", {"prompt": "a" * 5000}, 400, "too long"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"), ("/v1/chat/completions", {"messages": [{"role": "boss"}]}, 400, "role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "x"}]}, 400, "tools.0.type: "), ("/v1/chat/completions", {"messages": HELLO, "tool_choice": "x"}, 400, "tool_choice"),
    ("/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "json_schema"}}, 400, "response_format"),
    ("/v1/chat/completions", {"messages": HELLO, "guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice"),
    ("/v1/chat/completions", {"messages": HELLO, "top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}]}, 400, "arguments"),
    ("/v1/messages", {"messages": HELLO}, 400, "max_tokens"), ("/v1/messages", {"messages": HELLO, "max_tokens": 5, "model": "b"}, 404, "'b'"),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 5}, 400, "image"),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 5, "tools": [{"type": "web_search_1", "name": "w"}]}, 400, "tools.0"),
    ("/v1/responses", {"input": [{"type": "computer_call"}]}, 400, "computer_call"), ("/v1/responses", {"input": []}, 400, "input"),
    ("/tokenize", {}, 400, "prompt"), ("/detokenize", {"tokens": [-1]}, 400, "-1"), ("/detokenize", {"tokens": [10**30]}, 400, "vocabulary"),
]  # fmt: skip


def test_bad_input_is_one_line_in_the_shape_of_the_api() -> None:
    client = Client()
    for path, body, status, word in BAD:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        told = client.post(path, body, headers={"content-type": "application/json"})
        shown = told.json()
        assert "error" in shown, (path, body[:200])
        message = shown["error"]["message"]
        assert told.status_code == status and word in message and "\n" not in message, (
            body[:80],
            told.status_code,
            message,
        )
        if path == "/v1/messages":
            assert (shown["type"], set(shown["error"])) == ("error", {"type", "message"})
            assert told.headers["request-id"] == shown["request_id"]
        else:
            assert set(shown["error"]) == {"message", "type", "param", "code"}
    assert client.post("/v1/completions", {"prompt": "a"}).status_code == 200
    assert client.send("POST", "/v1/completions", content=b"{}").status_code == 415
    assert client.send("GET", "/v1/completions").status_code == 405
    assert client.send("GET", "/v1/models/other").status_code == 404


def test_keys_and_limits() -> None:
    client = Client(api_keys=("key",), max_body=100, max_queue=1)
    body = {"prompt": "a"}
    assert client.post("/v1/completions", body).status_code == 401
    assert client.post("/v1/completions", body, headers={"authorization": "Bearer lock"}).status_code == 401
    told = client.post("/v1/messages", body, headers={"x-api-key": "lock"})
    assert (told.status_code, told.json()["error"]["type"]) == (401, "authentication_error")
    for header in ({"authorization": "Bearer key"}, {"x-api-key": "key"}):
        assert client.post("/v1/completions", body, headers=header).status_code == 200
    assert client.send("GET", "/health").status_code == client.send("GET", "/metrics").status_code == 200
    told = client.post("/v1/messages", body)  # refused before an API sees it, in its shape
    assert told.status_code == 401 and told.headers["request-id"] == told.json()["request_id"]
    long = {"prompt": "a" * 200}
    assert client.post("/v1/completions", long, headers={"x-api-key": "key"}).status_code == 413

    async def drip() -> Any:
        for _ in range(50):
            yield b"    "

    told = client.send(
        "POST", "/v1/completions", content=drip(), headers={"x-api-key": "key", "content-type": "application/json"}
    )
    assert told.status_code == 413 and told.headers["connection"] == "close"
    for open_before, count, status in ((65, 1, 429), (63, 2, 200), (63, 3, 429), (0, 70, 200)):  # 64 run, 1 waits
        client.engine.unanswered = open_before
        told = client.post("/v1/completions", body | {"n": count}, headers={"x-api-key": "key"})
        assert told.status_code == status, (open_before, count)
        assert status == 200 or 1 <= int(told.headers["retry-after"]) <= 60


def test_scripts_of_pages_that_may_ask() -> None:
    ask = {
        "origin": "https://page",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    open_to, closed = Client(origins=("https://page",), api_keys=("key",)), Client(api_keys=("key",))
    told = open_to.send("OPTIONS", "/v1/completions", headers=ask)
    assert (told.status_code, told.headers["access-control-allow-origin"]) == (200, "https://page")
    assert closed.send("OPTIONS", "/v1/completions", headers=ask).status_code == 401
    told = open_to.send("OPTIONS", "/v1/completions", headers=ask | {"origin": "https://other"})
    assert "access-control-allow-origin" not in told.headers


@pytest.mark.parametrize("origin", ["page", "https://page/", "https://page/chat", "//page", "", "https://a https://b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="origins: expected"):
        Client(origins=("*", "http://localhost:3000", "chrome-extension://abc", origin))


def test_a_body_that_does_not_come() -> None:
    client = Client(body_timeout=0.05)

    async def stall() -> Any:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    told = client.send("POST", "/v1/completions", content=stall(), headers={"content-type": "application/json"})
    assert told.status_code == 408


def test_numbers_that_are_not_finite_and_an_engine_that_has_failed() -> None:
    client = Client()
    client.engine.script = lambda tokens, params: [Delta([72], "H"), Delta([], "", None, None, "logits are NaN")]
    told = client.post("/v1/completions", {"prompt": "a"})
    assert (told.status_code, told.json()["error"]["type"]) == (500, "server_error")
    events = read_events(client.post("/v1/chat/completions", {"messages": HELLO, "stream": True}).text)
    assert events[-1] == "[DONE]" and "NaN" in json.loads(events[-2])["error"]["message"]
    named = read_named(client.post("/v1/messages", {"messages": HELLO, "max_tokens": 9, "stream": True}))
    assert named[-1]["type"] == "error" and named[-1]["error"]["type"] == "api_error"
    named = read_named(client.post("/v1/responses", {"input": "a", "stream": True}))
    assert named[-1]["type"] == "response.failed" and "NaN" in named[-1]["response"]["error"]["message"]
    for kind, expected in (
        ("not_finite", (500, "not_finite")),
        ("no_answer", (400, "no_answer")),
        ("failed", (500, None)),
    ):
        client.engine.script = lambda *_, kind=kind: [Delta([], "", error="none", error_kind=kind)]  # type: ignore[misc]
        told = client.post("/v1/completions", {"prompt": "a"})
        assert (told.status_code, told.json()["error"]["code"]) == expected
        events = read_events(client.post("/v1/completions", {"prompt": "a", "stream": True}).text)
        assert json.loads(events[-2])["error"] == told.json()["error"]
        named = read_named(client.post("/v1/messages", {"messages": HELLO, "max_tokens": 9, "stream": True}))
        assert named[-1]["error"]["type"] == ("invalid_request_error" if kind == "no_answer" else "api_error")
    client.engine.failure = "it broke"
    assert client.post("/v1/completions", {"prompt": "a"}).status_code == 503
    assert client.send("GET", "/health").status_code == 503


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_agents_know() -> None:
    """They shorten the conversation and ask again."""
    client, many = Client(), [{"role": "user", "content": "a" * 5000}]
    for path, body in (("/v1/completions", {"prompt": [97] * 4090}), ("/v1/chat/completions", {"messages": many})):
        told = client.post(path, body)
        assert (told.status_code, told.json()["error"]["code"]) == (400, "context_length_exceeded")
    told = client.post("/v1/messages", {"messages": many, "max_tokens": 9})
    assert told.status_code == 400 and "prompt is too long" in told.json()["error"]["message"]

    async def refuse(prompts: Any, capture: bool = False) -> Any:
        raise RequestError("stop: not this one")

    client.engine.submit = refuse  # type: ignore[method-assign]
    told = client.post("/v1/completions", {"prompt": [97] * 4090})
    assert (told.json()["error"]["param"], told.json()["error"]["code"]) == ("stop", None)


def test_the_page_is_for_everybody_and_asks_for_the_key() -> None:
    client = Client(api_keys=("secret",))
    told = client.send("GET", "/")
    assert told.status_code == 200 and told.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in told.headers["content-security-policy"]
    assert '"title": "scripted", "look": null' in told.text and 'id="key"' in told.text
    assert client.send("GET", "/v1/models").status_code == 401 and "/" not in client.app.openapi()["paths"]


def test_more_selections_than_fit_are_refused_by_name() -> None:
    client = Client()
    body = {"prompt": "a", "max_tokens": 3000, "n": 64, "saccade": {"selection": True}}
    told = client.post("/v1/completions", body)
    assert told.status_code == 400 and told.json()["error"]["param"] == "saccade.selection"
    assert "expected a max_tokens of at most 1024, found 3000" in told.json()["error"]["message"]
    assert client.post("/v1/completions", body | {"n": 1}).status_code == 200
