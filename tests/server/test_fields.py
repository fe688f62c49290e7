"""Every field of every request: served, without effect, or refused by name. The page that lists them is the code's."""

import json
from typing import Any

import pytest
from api_client import Client
from pydantic import BaseModel

from saccade.chat.template import TemplateFormat
from saccade.errors import RequestError
from saccade.server.apis.types import ApiModel, Harmless, Unserved
from tools.docs.pages import ROOT
from tools.request_fields import PATHS, write_page

HELLO = [{"role": "user", "content": "Hello"}]
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 16},
    "/tokenize": {"messages": HELLO},
    "/detokenize": {"tokens": [65]},
}
# The fields of vLLM's requests, of its protocol.py files in November 2026.
VLLM = [
    "model",
    "prompt",
    "messages",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "allowed_token_ids",
    "prompt_logprobs",
    "logprob_token_ids",
    "bad_words",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "return_mm_kwargs",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "thinking_token_budget",
    "stream_interval",
]
VLLM_COMPLETIONS = [*VLLM, "suffix", "prompt_embeds"]
VLLM_CHAT = [
    "top_logprobs",
    "max_completion_tokens",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "include_reasoning",
    "parallel_tool_calls",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "return_prompt_text",
]


def list_said(model: type[BaseModel], kind: type) -> list[tuple[str, Any]]:
    return [
        (name, one) for name, field in model.model_fields.items() for one in field.metadata if isinstance(one, kind)
    ]


def list_models(model: type[BaseModel] = ApiModel) -> list[type[BaseModel]]:
    return [model, *(inner for one in model.__subclasses__() for inner in list_models(one))]


@pytest.mark.parametrize("path", PATHS)
def test_what_would_change_an_answer_is_refused_by_name_and_what_would_not_changes_nothing(path: str) -> None:
    client, least, model = Client(), LEAST[path], PATHS[path]
    plain = client.post(path, least).json()
    asked = client.engine.params[-1:]
    for name, refused in list_said(model, Unserved):
        told = client.post(path, {**least, name: "?"})
        assert (told.status_code, told.json()["error"].get("param", name)) == (400, name)
        assert told.json()["error"]["message"].startswith(f"{name}: {refused.why}; expected "), told.text
        for value in (None, *refused.neutral):
            assert client.post(path, {**least, name: value}).status_code == 200, (name, value)
            assert client.engine.params[-1:] == asked
    for name, _ in list_said(model, Harmless):
        value = {} if name == "stream_options" else ["?"]
        told = client.post(path, {**least, name: value})
        assert (told.status_code, told.json().keys()) == (200, plain.keys()), told.text
        assert client.engine.params[-1:] == asked


@pytest.mark.parametrize("path", PATHS)
def test_a_field_that_nobody_knows_is_refused_unless_the_server_drops_it(path: str) -> None:
    client = Client(ignored_fields=("num_ctx",))
    for name, near in (("modle", "; did you mean model?"), ("mirostat", "")):
        told = client.post(path, {**LEAST[path], name: 1})
        assert (
            told.status_code == 400 and told.json()["error"]["message"] == f"{name}: there is no such field here{near}"
        )
    assert client.post(path, {**LEAST[path], "num_ctx": 1}).status_code == 200


def test_fields_inside_of_fields_are_known_as_well() -> None:
    client = Client()
    for path, more, name in (
        ("/v1/chat/completions", {"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ("/v1/chat/completions", {"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}, *HELLO]}, "messages.0.function_call"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f"}, "defer_loading": True}]}, "tools.0.defer_loading"),
        ("/v1/responses", {"text": {"format": {"type": "text"}, "verbosity": "low"}}, "text.verbosity"),
        ("/v1/responses", {"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ("/v1/responses", {"include": ["message.output_text.logprobs"]}, "include.0"),
        ("/v1/responses", {"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools.0.defer_loading"),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "tools.0.defer_loading"),
        ("/v1/messages", {"thinking": {"type": "enabled", "budget": 5}}, "thinking.budget"),
        ("/v1/messages", {"context_management": {"edits": [{"type": "clear_tool_uses_20250919", "trigger": {}}]}}, "context_management.edits.0"),
        ("/v1/messages", {"output_config": {"effort": "banana"}}, "output_config.effort"),
    ):  # fmt: skip
        told = client.post(path, {**LEAST[path], **more})
        assert told.status_code == 400 and told.json()["error"]["message"].startswith(f"{name}: "), told.text
        assert told.json()["error"].get("param", name) == name
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    assert client.post("/v1/messages", {**LEAST["/v1/messages"], "context_management": edits}).status_code == 200


def test_errors_of_messages_and_tools_name_their_place() -> None:
    """In the request, whatever the messages became on the way."""
    client, result = Client(), {"type": "tool_result", "tool_use_id": "a", "content": "?"}
    output = {"type": "function_call_output", "call_id": "a", "output": "?"}
    for path, more, name in (
        ("/v1/chat/completions", {"tools": [{"type": "x"}]}, "tools.0.type"), ("/v1/chat/completions", {"tools": [{}]}, "tools.0.function"),
        ("/v1/chat/completions", {"messages": [*HELLO, {"role": "boss"}]}, "messages.1.role"),
        ("/v1/messages", {"system": "Be short.", "messages": [*HELLO, {"role": "user", "content": [result]}]}, "messages.1"),
        ("/v1/responses", {"instructions": "Be short.", "input": [*HELLO, output]}, "input.1"),
    ):  # fmt: skip
        told = client.post(path, {**LEAST[path], **more})
        assert told.status_code == 400 and told.json()["error"]["message"].startswith(f"{name}: "), told.text
        assert told.json()["error"].get("param", name) == name


def test_errors_name_the_field_as_the_request_calls_it() -> None:
    """Also those of the engine, which knows other names, and those of a type that has alternatives."""
    client = Client()
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "q"}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}

    async def refuse(prompts: Any, capture: bool = False) -> Any:
        raise RequestError(f"{prompts[0][1].constraint[0]}: cannot be compiled")

    client.engine.submit = refuse  # type: ignore[method-assign]
    for path, more, field in (
        ("/v1/completions", {"guided_regex": "("}, "guided_regex"),
        ("/v1/completions", {"guided_regex": "(", "stream": True}, "guided_regex"),
        ("/v1/chat/completions", {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ("/v1/chat/completions", {"tools": [tool]}, "tools"),
        ("/v1/responses", {"text": {"format": schema}}, "text.format.schema"),
    ):
        error = client.post(path, LEAST[path] | more).json()["error"]
        assert (error["param"], error["message"]) == (field, f"{field}: cannot be compiled")
    client = Client()
    for path, more, field in (
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "text": "Hi"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ):
        answer = client.post(path, LEAST[path] | more)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
        assert answer.json()["error"]["message"].startswith(f"{field}: ")
    same = {"max_tokens": 5, "max_completion_tokens": 5}
    assert client.post("/v1/chat/completions", {"messages": HELLO, **same}).status_code == 200
    client = Client(chat=TemplateFormat({"default": "{{ messages[-1].content }}"}, {}, "plain.jinja"))
    for path, more, field in (
        ("/v1/responses", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("/v1/messages", {"output_config": {"effort": "high"}}, "output_config.effort"),
    ):
        text = client.post(path, LEAST[path] | more).json()["error"]["message"]
        assert text == f"{field}: this model has no thinking"


def test_what_stands_twice_is_refused_by_name() -> None:
    """Of two values, one would be passed over in silence."""
    client, head = Client(), {"content-type": "application/json"}
    for body, name in (
        ({"prompt": "a", "logit_bias": {"1": 5, "01": -5}}, "logit_bias"),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "seed"),
        (b'{"prompt": "a", "logit_bias": {"7": 1, "8": 2, "7": 3}}', "7"),
    ):
        error = client.post("/v1/completions", body, headers=head).json()["error"]
        assert error["param"] == name and error["message"].startswith(f"{name}: "), error
    assert client.post("/v1/completions", {"prompt": "a", "logit_bias": {"01": 5}}).status_code == 200
    assert client.engine.params[-1].biases == ((1, 5.0),)


def test_text_and_chats_have_fields_of_their_own_in_tokenize() -> None:
    client = Client()
    text, chat, tool = {"prompt": "Hi"}, {"messages": HELLO}, {"type": "function", "function": {"name": "f"}}
    for body, name in (
        ({**text, "tools": [tool]}, "tools"),
        ({**text, "chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        ({**chat, "add_special_tokens": True}, "add_special_tokens"),
        ({**chat, **text}, "prompt"),
    ):
        error = client.post("/tokenize", body).json()["error"]
        assert error["param"] == name and error["message"].startswith(f"{name}: "), error
    for body in ({**text, "tools": []}, {**chat, "add_special_tokens": False, "tools": [tool]}):
        assert client.post("/tokenize", body).status_code == 200


def test_limits_on_tokens_have_the_name_that_the_request_gave_them() -> None:
    client = Client()

    async def refuse(prompts: Any, capture: bool = False) -> Any:
        raise RequestError(f"max_tokens: {len(prompts[0][0])} prompt tokens and {10**6} new ones")

    for path, more, name in (
        ("/v1/responses", {"max_output_tokens": 1 << 63}, "max_output_tokens"),
        ("/v1/messages", {"stop_sequences": [""]}, "stop_sequences"),
        ("/v1/messages", {"stop_sequences": ["a"] * 65}, "stop_sequences"),
    ):
        error = client.post(path, {**LEAST[path], **more}).json()["error"]
        assert error.get("param", name) == name and error["message"].startswith(f"{name}: "), error
    client.engine.submit = refuse  # type: ignore[method-assign]
    for path, more, name in (
        ("/v1/responses", {"max_output_tokens": 10**6}, "max_output_tokens"),
        ("/v1/chat/completions", {"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ("/v1/chat/completions", {"max_tokens": 10**6}, "max_tokens"),
        ("/v1/completions", {"max_tokens": 10**6}, "max_tokens"),
    ):
        for stream in (False, True):
            error = client.post(path, {**LEAST[path], **more, "stream": stream}).json()["error"]
            assert error["param"] == name and error["message"].startswith(f"{name}: "), error
            assert error["code"] == "context_length_exceeded"


def test_errors_of_a_whole_prompt_name_the_field_that_it_is() -> None:
    client, surrogate = Client(), "\ud800"
    for path, body, name in (
        ("/v1/completions", {"prompt": surrogate}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": surrogate}]}, "messages"),
        ("/v1/responses", {"input": surrogate}, "input"),
        ("/v1/responses", {"input": "a" * 5000}, "input"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 5000}]}, "messages"),
    ):
        told = client.post(path, json.dumps(body).encode(), headers={"content-type": "application/json"})
        assert told.json()["error"]["param"] == name, told.text
    client = Client(chat=TemplateFormat({"default": "{{ raise_exception('no') }}"}, {}, "chat_template.jinja"))
    assert client.post("/v1/chat/completions", {"messages": HELLO}).json()["error"]["param"] == "messages"


def test_the_last_message_goes_on_if_it_is_the_assistants() -> None:
    client, begun, spoken = Client(), {"role": "assistant", "content": "It is"}, [*HELLO]
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is"}]}
    for path, body in (
        ("/v1/chat/completions", {"messages": [*spoken, begun]}),
        ("/v1/chat/completions", {"messages": [*spoken, begun], "continue_final_message": True}),
        ("/v1/chat/completions", {"messages": [*spoken, begun], "add_generation_prompt": False}),
        ("/v1/chat/completions", {"messages": [*spoken, begun | {"prefix": True}]}),
        ("/v1/messages", {"messages": [*spoken, begun], "max_tokens": 9}),
        ("/v1/responses", {"input": [*spoken, item]}),
    ):
        assert client.post(path, body).status_code == 200
        assert client.prompt.endswith("</think>It is"), path
    counted = client.post("/tokenize", {"messages": [*spoken, begun]}).json()
    assert counted["tokens"] == client.engine.prompts[-1]
    for more in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        told = client.post("/v1/chat/completions", {"messages": [*spoken, begun], **more})
        assert (told.status_code, told.json()["error"]["param"]) == (400, "messages.1")
    for more in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        told = client.post("/v1/chat/completions", {"messages": spoken, **more})
        assert (told.status_code, told.json()["error"]["param"]) == (400, "messages.0")


LAST = TemplateFormat({"default": "{{ messages[-1].content }}{# <tool_call><arg_key> #}"}, {}, "t.jinja")


@pytest.mark.parametrize("chat", [None, LAST], ids=["encoding", "template"])
def test_results_and_calls_belong_together(chat: Any) -> None:
    """Whatever the format. As OpenAI and Anthropic have it, but for results without an id, which stand in order."""
    client = Client(chat=chat)
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    ask = {"role": "assistant", "content": None, "tool_calls": calls}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}

    def tell(id: str) -> tuple[Any, Any, Any]:
        used = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": id, "content": "?"}]}
        output = {"type": "function_call_output", "call_id": id, "output": "?"}
        return {"role": "tool", "tool_call_id": id, "content": "?"}, used, output

    for path, field, asked, told, other in (
        ("/v1/chat/completions", "messages", ask, tell("a")[0], tell("b")[0]),
        ("/v1/messages", "messages", use, tell("a")[1], tell("b")[1]),
        ("/v1/responses", "input", call, tell("a")[2], tell("b")[2]),
    ):
        good, lone, unanswered, wrong = [*HELLO, asked, told], [told], [*HELLO, asked], [*HELLO, asked, other]
        for messages, at in ((good, None), (lone, 0), (unanswered, 1), (wrong, 2)):
            answer = client.post(path, {**LEAST[path], field: messages})
            assert answer.status_code == (200 if at is None else 400), answer.text
            if at is not None:
                error = answer.json()["error"]
                assert error["message"].startswith(f"{field}.{at}: "), error
                assert error.get("param", f"{field}.{at}") == f"{field}.{at}"
    nameless = {"messages": [*HELLO, ask, {"role": "tool", "content": "?"}]}
    assert client.post("/v1/chat/completions", nameless).status_code == 200


def test_values_that_ask_for_nothing_are_refused() -> None:
    client = Client()
    for more, name in (
        ({"stop": [""]}, "stop"), ({"stop": ""}, "stop"), ({"guided_choice": []}, "guided_choice"), ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"), ({"guided_regex": ""}, "guided_regex"), ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a(?=b)"}, "guided_regex"), ({"guided_json": {"not": {}}}, "guided_json"), ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.format"), ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"structured_outputs": {"structural_tag": {"type": "structural_tag", "format": {"type": "regex", "pattern": "(?!a)"}}}}, "structured_outputs.structural_tag"),
        ({"prompt_logprobs": 2, "stream": True}, "prompt_logprobs"), ({"stream_options": {}}, "stream_options"),
    ):  # fmt: skip
        for path in ("/v1/completions", "/v1/chat/completions"):
            told = client.post(path, {**LEAST[path], **more})
            assert (told.status_code, told.json()["error"].get("param")) == (400, name), (more, told.text)
            assert told.json()["error"]["message"].startswith(f"{name}: ")


def test_the_page_of_fields_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "request-fields.md").read_text()
    assert written == write_page(), "python -m tools.request_fields > docs/request-fields.md"


def test_no_field_of_vllm_is_unknown() -> None:
    completions, chat = (set(PATHS[path].model_fields) for path in ("/v1/completions", "/v1/chat/completions"))
    assert set(VLLM_COMPLETIONS) - completions == {"messages"} and set(VLLM + VLLM_CHAT) - chat == {"prompt"}


def test_refused_fields_say_it_of_themselves() -> None:
    """Each model once: `Annotated` would make one of two refusals that are equal."""
    for model in list_models():
        for name, refused in list_said(model, Unserved):
            assert model.model_fields[name].default is None and refused.why
