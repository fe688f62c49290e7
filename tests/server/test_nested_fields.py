"""Objects inside of requests: every key is known, without effect, or refused by its name."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import Client

from saccade.server.apis.types import ApiModel, Harmless, Unserved

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FREE = (
    "parameters",
    "input_schema",
    "schema",
    "metadata",
    "chat_template_kwargs",
)  # what a client may write as it likes
ANY = ["anything"]
TEXT = {"type": "text", "text": "Hi", "cache_control": ANY, "prompt_cache_breakpoint": ANY}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": False}
CHAT = [
    {"role": "system", "content": [TEXT], "name": "s", "cache_control": ANY},
    {"role": "user", "content": [TEXT], "name": "u", "cache_control": ANY},
    {
        "role": "assistant", "content": [TEXT], "name": "a", "reasoning_content": "hm", "prefix": False, "annotations": ANY,
        "parsed": ANY, "unparsed": ANY, "provider_specific_fields": ANY, "cache_control": ANY,
        "tool_calls": [{"id": "a", "index": ANY, "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": ANY}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": [TEXT], "name": "f", "cache_control": ANY},
]  # fmt: skip
BLOCK = {"type": "text", "text": "Hi", "cache_control": ANY, "citations": ANY}
DOCUMENT = {"type": "document", "source": {"type": "text", "data": "D", "media_type": "text/plain"}, "title": "t", "cache_control": ANY, "citations": {"enabled": False}}  # fmt: skip
ITEM = {"id": ANY, "status": ANY}
PART = {"text": "Hi", "annotations": ANY, "logprobs": ANY, "prompt_cache_breakpoint": ANY, "parsed": ANY}
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": CHAT,
        "tools": [{"type": "function", "function": FUNCTION, "cache_control": ANY, "defer_loading": False}],
        "response_format": {"type": "json_schema", "json_schema": {"name": ANY, "schema": SCHEMA, "strict": True, "description": ANY}},
    },
    "/v1/messages": {
        "max_tokens": 9,
        "system": [BLOCK],
        "messages": [
            {"role": "user", "content": [BLOCK, DOCUMENT]},
            {
                "role": "assistant",
                "content": [
                    BLOCK,
                    {"type": "thinking", "thinking": "hm", "signature": ANY, "cache_control": ANY},
                    {"type": "redacted_thinking", "data": ANY},
                    {"type": "tool_use", "id": "a", "name": "f", "input": {}, "cache_control": ANY, "caller": {"type": "direct"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [BLOCK, DOCUMENT], "is_error": True, "cache_control": ANY}, BLOCK]},
            {"role": "system", "content": [BLOCK]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA, "description": "d", "type": "custom", "cache_control": ANY, "eager_input_streaming": ANY, "defer_loading": False}],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": ANY}]},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [PART | {"type": "input_text"}], "phase": ANY, **ITEM},
            {"type": "reasoning", "summary": [PART | {"type": "summary_text"}], "content": [PART | {"type": "reasoning_text"}], **ITEM},
            {"type": "message", "role": "assistant", "content": [PART | {"type": "output_text"}], "phase": ANY, **ITEM},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "async": False, "caller": {"type": "direct"}, "parsed_arguments": ANY, **ITEM},
            {"type": "function_call_output", "call_id": "a", "output": [PART | {"type": "input_text"}], "name": ANY, **ITEM},
        ],
        "tools": [{"type": "function", **FUNCTION, "async": False, "defer_loading": False, "allowed_callers": ["direct"]}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
    },
    "/tokenize": {"messages": CHAT, "tools": [{"type": "function", "function": FUNCTION}]},
}  # fmt: skip


def list_objects(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each object inside of a request stands, but those that are free."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in entries:
        if name in FREE or (name == "input" and "tool_use" in value.values()) or inner == {"type": "direct"}:
            continue
        if isinstance(inner, dict):
            yield (*place, name)
        yield from list_objects(inner, (*place, name))


@pytest.mark.parametrize("path", WHOLE)
def test_every_object_inside_of_a_request_refuses_a_key_that_nobody_knows(path: str) -> None:
    """And takes all that are known: those of a client that sends back what it was told."""
    client, tolerant, places = Client(), Client(), list(list_objects(WHOLE[path]))
    assert client.post(path, WHOLE[path]).status_code == 200 and len(places) > 8
    for place in places:
        body = json.loads(json.dumps(WHOLE[path]))  # nothing in it is shared
        found = body
        for part in place:
            found = found[part]
        found["typo"] = 1
        error = client.post(path, body).json()["error"]
        name = ".".join(map(str, (*place, "typo")))
        assert error["message"].startswith(f"{name}: there is no such field here"), (name, error)
        assert error.get("param", name) == name
        # As a new application with this one field ignored, which takes 0.1 s to make; there are 90 places.
        tolerant.app.state.ignored_fields = (".".join(str(part) for part in (*place, "typo") if isinstance(part, str)),)
        assert tolerant.post(path, body).status_code == 200, name


def strip(value: Any) -> Any:
    """The same without what has no effect."""
    if isinstance(value, dict):
        return {
            name: strip(inner)
            for name, inner in value.items()
            if inner != ANY and name not in ("is_error", "id" * (value.get("type") == "message"))
        }
    return [strip(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", [path for path in WHOLE if path != "/tokenize"])
def test_what_is_without_effect_changes_no_prompt(path: str) -> None:
    client = Client()
    for body in (WHOLE[path], strip(WHOLE[path])):
        assert client.post(path, body).status_code == 200
    first, second = client.engine.prompts[-2:]
    assert first == second and client.engine.params[-2] == client.engine.params[-1]
    assert json.dumps(ANY) not in client.prompt


@pytest.mark.parametrize(
    ("path", "more", "name", "words"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0.type", "the model reads text alone; expected 'text', found 'image_url'"),
        ("/v1/chat/completions", {"messages": [{"role": "boss", "content": "a"}]}, "messages.0.role", "expected 'system', 'developer', 'user', 'assistant', 'tool', found 'boss'"),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, "messages.0.role", "expected 'system', "),
        ("/v1/chat/completions", {"messages": ["a"]}, "messages.0", "expected an object, found 'a'"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages.0.tool_calls", "there is no such field here"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "", "refusal": "no"}, *CHAT[1:2]]}, "messages.0.refusal", "write it as content; expected '', found 'no'"),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "f", "parameter": {}}}]}, "tools.0.function.parameter", "there is no such field here"),
        ("/v1/chat/completions", {"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "Input should be 'function', found 'custom'"),
        ("/v1/chat/completions", {"tools": [FUNCTION]}, "tools.0.function", "Field required"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type", "expected 'text', 'document', 'tool_result', found 'image'"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [DOCUMENT | {"citations": {"enabled": True}}]}]}, "messages.0.content.0.citations.enabled", "not supported"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "a", "media_type": "application/pdf"}}]}]}, "messages.0.content.0.source.type", "the model reads text alone"),
        ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "w", "max_uses": 5}]}, "tools.0", "'web_search_20250305' would run on the server"),
        ("/v1/messages", {"tools": [{"name": "f"}]}, "tools.0.input_schema", "Field required"),
        ("/v1/responses", {"input": [{"type": "computer_call", "id": "a"}]}, "input.0.type", "expected 'message', "),
        ("/v1/responses", {"tools": [{"type": "web_search", "filters": {}}]}, "tools.0.type", "Input should be 'function', found 'web_search'"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input.0.content.0.type", "the model reads text alone"),
    ],
)  # fmt: skip
def test_what_is_wrong_inside_is_told_by_its_place(path: str, more: dict[str, Any], name: str, words: str) -> None:
    told = Client().post(path, {**WHOLE[path], **more})
    error = told.json()["error"]
    assert told.status_code == 400 and error["message"].startswith(f"{name}: {words}"), error
    assert error.get("param", name) == name


def test_all_keys_that_are_without_effect_are_tried() -> None:
    """So that a new one is."""
    tried = set(find_names(WHOLE))
    kinds = [model for model in ApiModel.__subclasses__() if model.__module__.startswith("saccade.server.apis.parts")]
    for model in kinds:
        for each in (
            model,
            *model.__subclasses__(),
            *(two for one in model.__subclasses__() for two in one.__subclasses__()),
        ):
            names = [
                f.alias or n for n, f in each.model_fields.items() if any(isinstance(m, Harmless) for m in f.metadata)
            ]
            assert set(names) <= tried, each
            assert all(m.why for f in each.model_fields.values() for m in f.metadata if isinstance(m, Unserved))


def find_names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from find_names(inner)
