"""What answers tell beside their text: numbers of prompts, offsets, limits of reasoning, and what was asked."""

import base64
import json
from typing import Any

from api_client import Client

from saccade.chat.template import DEFAULT, TemplateFormat
from saccade.server.engine.wire import Counts, Delta

HELLO = [{"role": "user", "content": "Hello"}]
ROWS = [(257, -1.0, [(104, -0.5), (257, -1.0)]), (195, -2.0, [(104, -0.25), (105, -0.5)])]


def test_the_numbers_of_a_prompt_are_told_as_by_vllm() -> None:
    client = Client()
    client.engine.script = lambda tokens, params: [Delta([72], "H", None, "stop", None, Counts(), ROWS)]
    told = [
        None,
        {
            "104": {"logprob": -0.5, "rank": 1, "decoded_token": "h"},
            "257": {"logprob": -1.0, "rank": None, "decoded_token": "<|end|>"},
        },
        {
            "104": {"logprob": -0.25, "rank": 1, "decoded_token": "h"},
            "195": {"logprob": -2.0, "rank": None, "decoded_token": "\ufffd"},
        },
    ]
    whole = client.post("/v1/completions", {"prompt": [72, 257, 195], "prompt_logprobs": 1}).json()
    assert whole["choices"][0]["prompt_logprobs"] == told and client.engine.params[-1].prompt_logprobs == 1
    whole = client.post(
        "/v1/chat/completions", {"messages": HELLO, "prompt_logprobs": 1, "return_token_ids": True}
    ).json()
    assert whole["prompt_logprobs"] == told and whole["choices"][0]["token_ids"] == [72]
    assert whole["prompt_token_ids"] == client.engine.prompts[-1]
    body = {"prompt": [72, 257, 195], "prompt_logprobs": 0, "echo": True, "logprobs": 2, "max_tokens": 1}
    client.engine.script = lambda tokens, params: [Delta([72], "H", [(72, 0.0, [])], "stop", None, Counts(), ROWS)]
    choice = client.post("/v1/completions", body).json()["choices"][0]
    assert client.engine.params[-1].prompt_logprobs == 2  # the most of the two
    assert list(choice["prompt_logprobs"][1]) == ["257"] and len(choice["logprobs"]["top_logprobs"][1]) == 2


def test_offsets_are_places_in_the_text() -> None:
    """A special token takes no room, and of a character of several tokens only the last one does."""
    client = Client()
    rows: list[Any] = [(72, -0.5, []), (195, -0.5, []), (169, -0.5, []), (105, -0.5, []), (257, -0.5, [])]
    client.engine.script = lambda tokens, params: [
        Delta([72, 195], "H", rows[:2], None, None, Counts(), ROWS), Delta([169, 105, 257], "éi", rows[2:], "stop"),
    ]  # fmt: skip
    body = {"prompt": [256, 72, 105], "logprobs": 0, "echo": True, "return_tokens_as_token_ids": True}
    choice = client.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("HiHéi", [0, 0, 1, 2, 3, 3, 4, 5])
    assert choice["logprobs"]["tokens"][0] == "token_id:256"
    shown = client.post("/v1/completions", body | {"echo": False, "skip_special_tokens": False}).json()["choices"][0]
    assert shown["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]


def test_messages_think_only_if_they_ask_and_up_to_their_budget() -> None:
    always = TemplateFormat(
        {DEFAULT: "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{# </think> #}"}, {}, ""
    )
    client, body = Client("hm</think>Yes.", chat=always), {"messages": HELLO, "max_tokens": 100}
    for thinking, is_on in ((None, False), ({"type": "adaptive"}, True), ({"type": "disabled"}, False)):
        client.post("/v1/messages", {**body, "thinking": thinking})
        assert client.prompt.endswith("<think>") == is_on
    asked = {**body, "thinking": {"type": "enabled", "budget_tokens": 30, "display": "omitted"}}
    told = client.post("/v1/messages", asked).json()
    assert told["content"] == [{"type": "thinking", "thinking": "", "signature": ""}, {"type": "text", "text": "Yes."}]
    assert '"max_tokens": 30' in (client.engine.params[-1].constraint or ("", ""))[1]
    assert "hm" not in client.post("/v1/messages", asked | {"stream": True}).text
    client.post("/v1/messages", {**body, "thinking": {"type": "enabled", "budget_tokens": 99}})
    assert client.engine.params[-1].constraint is None  # the answer ends before
    client.post("/v1/chat/completions", {"messages": HELLO, "thinking": True, "thinking_token_budget": 7})
    assert '"max_tokens": 7' in (client.engine.params[-1].constraint or ("", ""))[1]


def test_each_api_has_its_words_for_a_call_that_must_come() -> None:
    schema = {"type": "object", "properties": {"k": {"type": "integer"}}}
    function = {"name": "f", "parameters": schema}
    for path, body in (
        ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": function}], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **function}], "tool_choice": {"type": "function", "name": "f"}}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **function}], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "tool", "name": "f"}}),
    ):  # fmt: skip
        client = Client()
        assert client.post(path, body).status_code == 200
        name, text = client.engine.params[-1].constraint or ("", "")
        assert name == "structural_tag" and 'invoke name=\\"f\\"' in text and "any_text" not in text, (path, text)
        is_single = "allowed_tools" not in json.dumps(body) and body.get("tool_choice") != "required"
        assert ('"stop_after_first": true' in text) == is_single


def test_a_response_says_what_was_asked_and_how_its_items_ended() -> None:
    client = Client("hm</think>Yes", reason="length")
    schema = {"type": "object", "properties": {"k": {"enum": [1]}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    body = {"input": "a", "text": {"format": form}, "reasoning": {"effort": "low"}, "parallel_tool_calls": False}
    told = client.post("/v1/responses", body | {"include": ["reasoning.encrypted_content"]}).json()
    assert told["text"] == {"format": form | {"description": None}} and told["parallel_tool_calls"] is False
    assert [item["status"] for item in told["output"]] == ["completed", "incomplete"] and told["status"] == "incomplete"
    thought = told["output"][0]
    assert base64.b64decode(thought["encrypted_content"]) == b"hm" and client.prompt.endswith("<think>")
    back = [{"role": "user", "content": "a"}, thought | {"content": None}, told["output"][1]]
    assert client.post("/v1/responses", {"input": back}).status_code == 200
    wrong = [{"role": "user", "content": "a"}, {"type": "reasoning", "summary": [], "encrypted_content": "?"}]
    told = client.post("/v1/responses", {"input": wrong})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "input.1.encrypted_content")
    assert client.post("/v1/responses", {"input": "a"}).json()["text"] == {"format": {"type": "text"}}
