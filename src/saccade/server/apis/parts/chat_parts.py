"""Messages and tools inside of chats, as OpenAI's clients and those of other engines send them.

What the answers of this server have comes back in the next request, so that all of it is known here. Next:
apis/chat_fields.py, whose requests have these.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.server.apis.types import ApiModel, As, Harmless, Reason, Unserved, YesNo, one_of


class TextPart(ApiModel):
    text: str
    type: Annotated[Any, Unserved(Reason.READS_TEXT, "text")] = None
    cache_control: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    prompt_cache_breakpoint: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None


Content = str | list[TextPart]


class CalledFunction(ApiModel):
    name: str
    arguments: str | dict[str, Any] | None = None
    parsed_arguments: Annotated[Any, Harmless("of a client; `arguments` says it")] = None


class ToolCall(ApiModel):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: Annotated[Any, Harmless("calls stand in their order")] = None


class FunctionDefinition(ApiModel):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: YesNo | None = None


class ChatTool(ApiModel):
    function: FunctionDefinition
    type: Literal["function"] | None = None
    cache_control: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    defer_loading: Annotated[Any, Unserved(Reason.ALL_AT_ONCE, False)] = None


class NamedMessage(ApiModel):
    name: str | None = None  # for templates that write it
    cache_control: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None


class SystemMessage(NamedMessage):
    role: Literal["system", "developer"]
    content: Content | None = None
    tools: list[ChatTool] | None = None  # of DeepSeek's encoding, as the next one
    response_format: dict[str, Any] | None = None


class UserMessage(NamedMessage):
    role: Literal["user"]
    content: Content


class AssistantMessage(NamedMessage):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # other names of the same
    thinking: str | None = None
    prefix: YesNo | None = None  # DeepSeek's word for a last message that goes on, as every one does here
    unparsed: Annotated[Any, Harmless("what this server told of a call that is none")] = None
    annotations: Annotated[Any, Harmless("of a web search, told to no model")] = None
    parsed: Annotated[Any, Harmless("of a client; `content` says it")] = None
    provider_specific_fields: Annotated[Any, Harmless("of a proxy")] = None
    refusal: Annotated[Any, Unserved("write it as content", "")] = None
    audio: Annotated[Any, Unserved(Reason.READS_TEXT)] = None
    function_call: Annotated[Any, Unserved("of an older API; use tool_calls")] = None


class ToolMessage(NamedMessage):
    role: Literal["tool"]
    content: Content | None = None
    tool_call_id: str | None = None


MESSAGE = As(one_of("role", SystemMessage, UserMessage, AssistantMessage, ToolMessage))
ChatMessages = list[Annotated[dict[str, Any], MESSAGE]]
ChatTools = list[Annotated[dict[str, Any], As(ChatTool)]]
