"""No field of the published APIs is unknown: those of the `openai` and `anthropic` packages, by the server's description."""

import anthropic
import openai
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import chat as chat_types
from openai.types import completion_create_params, responses
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, response_input_item_param
from openai.types.shared_params import FunctionDefinition
from served_model import ServedModel

PUBLISHED = {
    "/v1/completions": completion_create_params.CompletionCreateParamsBase,
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsBase,
    "/v1/responses": response_create_params.ResponseCreateParamsBase,
    "/v1/messages": message_create_params.MessageCreateParamsBase,
    "/v1/messages#beta": beta_create_params.MessageCreateParamsBase,
    "/v1/messages/count_tokens": message_count_tokens_params.MessageCountTokensParams,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_every_published_field_is_served_without_effect_or_refused(scripted: ServedModel, path: str) -> None:
    told = scripted.client.get("/openapi.json").json()
    content = told["paths"][path.partition("#")[0]]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(PUBLISHED[path].__annotations__) - set(told["components"]["schemas"][name]["properties"]) == set()


# Objects inside of requests, by the name of theirs in the description.
INSIDE = {
    "SystemMessage": (chat_types.ChatCompletionSystemMessageParam, chat_types.ChatCompletionDeveloperMessageParam),
    "UserMessage": (chat_types.ChatCompletionUserMessageParam,),
    "AssistantMessage": (chat_types.ChatCompletionAssistantMessageParam,),
    "ToolMessage": (chat_types.ChatCompletionToolMessageParam,),
    "TextPart": (chat_types.ChatCompletionContentPartTextParam,),
    "ToolCall": (chat_types.ChatCompletionMessageFunctionToolCallParam,),
    "ChatTool": (chat_types.ChatCompletionFunctionToolParam,),
    "FunctionDefinition": (FunctionDefinition,),
    "MessageItem": (responses.EasyInputMessageParam, responses.ResponseOutputMessageParam),
    "ItemText": (responses.ResponseInputTextParam, responses.ResponseOutputTextParam),
    "ReasoningItem": (responses.ResponseReasoningItemParam,),
    "CallItem": (responses.ResponseFunctionToolCallParam,),
    "OutputItem": (response_input_item_param.FunctionCallOutput,),
    "ResponseTool": (responses.FunctionToolParam,),
    "TextBlock": (anthropic.types.TextBlockParam, anthropic.types.beta.BetaTextBlockParam),
    "DocumentBlock": (anthropic.types.DocumentBlockParam, anthropic.types.beta.BetaRequestDocumentBlockParam),
    "ToolUseBlock": (anthropic.types.ToolUseBlockParam, anthropic.types.beta.BetaToolUseBlockParam),
    "ToolResultBlock": (anthropic.types.ToolResultBlockParam, anthropic.types.beta.BetaToolResultBlockParam),
    "ThinkingBlock": (anthropic.types.ThinkingBlockParam, anthropic.types.beta.BetaThinkingBlockParam),
    "RedactedThinkingBlock": (anthropic.types.RedactedThinkingBlockParam,),
    "InputTool": (anthropic.types.ToolParam, anthropic.types.beta.BetaToolParam),
}


def test_every_published_field_of_an_object_inside_is_known(scripted: ServedModel) -> None:
    schemas = scripted.client.get("/openapi.json").json()["components"]["schemas"]
    unknown = {
        f"{name}: {published.__name__}": left
        for name, types in INSIDE.items()
        for published in types
        if (left := set(published.__annotations__) - set(schemas[name]["properties"]))
    }
    assert unknown == {}


def test_what_was_told_comes_back(scripted: ServedModel) -> None:
    """Answers as the clients hold them, sent again: nothing of them is unknown."""
    ask = {"role": "user", "content": "What's the weather in Paris right now? Use the tool."}
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = [{"type": "function", "function": {**function, "strict": True}}]
    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
    with client.chat.completions.stream(model="scripted", messages=[ask], tools=tools) as stream:
        parsed = stream.get_final_completion().choices[0].message
    made = client.chat.completions.create(model="scripted", messages=[ask], tools=tools).choices[0].message
    for message in (made, made.model_dump(), parsed, parsed.model_dump()):
        calls = message["tool_calls"] if isinstance(message, dict) else message.tool_calls
        id = calls[0]["id"] if isinstance(message, dict) else calls[0].id
        result = {"role": "tool", "tool_call_id": id, "content": '{"temp_c": 18}'}
        told = client.chat.completions.create(model="scripted", messages=[ask, message, result], tools=tools)
        assert told.choices[0].message.content == "It is 18 degrees and clear in Paris."
    flat = [{"type": "function", **function, "strict": True}]
    with client.responses.stream(model="scripted", input=[ask], tools=flat) as stream:
        final = stream.get_final_response()
    for output in (final.output, [item.model_dump() for item in final.output]):
        result = {"type": "function_call_output", "call_id": final.output[0].call_id, "output": '{"temp_c": 18}'}
        told = client.responses.create(model="scripted", input=[ask, *output, result], tools=flat)
        assert told.output_text == "It is 18 degrees and clear in Paris."
    messages = anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0).messages
    tool = {"name": "get_weather", "input_schema": function["parameters"]}
    told = messages.create(model="scripted", max_tokens=99, messages=[ask], tools=[tool])
    for content in (told.content, [block.model_dump() for block in told.content]):
        result = {"type": "tool_result", "tool_use_id": told.content[-1].id, "content": '{"temp_c": 18}'}
        talk = [ask, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
        again = messages.create(model="scripted", max_tokens=99, messages=talk, tools=[tool])
        assert again.content[0].text == "It is 18 degrees and clear in Paris."
