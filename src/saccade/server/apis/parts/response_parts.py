"""Items and tools inside of requests of OpenAI's Responses API. Next: apis/response_fields.py, which reads them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.server.apis.parts.message_parts import DIRECT
from saccade.server.apis.types import ApiModel, As, Harmless, Reason, Unserved, YesNo, one_of

TEXT_KINDS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class ItemText(ApiModel):
    text: str
    type: Annotated[Any, Unserved(Reason.READS_TEXT, *TEXT_KINDS)] = None
    annotations: Annotated[Any, Harmless("of a web search, told to no model")] = None
    logprobs: Annotated[Any, Harmless("of an earlier answer, told to no model")] = None
    prompt_cache_breakpoint: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    parsed: Annotated[Any, Harmless("of a client; `text` says it")] = None


ItemContent = str | list[Annotated[dict[str, Any], As(ItemText)]]


class Item(ApiModel):
    id: Annotated[Any, Harmless("nothing is kept, so that nothing is looked for")] = None
    status: Annotated[Any, Harmless("what comes is taken as it is")] = None


class MessageItem(Item):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    phase: Annotated[Any, Harmless("formats have no phases")] = None


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: ItemContent | None = None
    content: ItemContent | None = None
    encrypted_content: str | None = None


class Called(Item):
    call_id: str
    caller: Annotated[Any, Unserved(Reason.NO_TOOLS, DIRECT)] = None
    namespace: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None


class CallItem(Called):
    type: Literal["function_call"]
    name: str
    arguments: str
    async_: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = Field(None, alias="async")
    parsed_arguments: Annotated[Any, Harmless("of a client; `arguments` says it")] = None


class OutputItem(Called):
    type: Literal["function_call_output"]
    output: ItemContent | None = None
    name: Annotated[Any, Harmless("the call has it")] = None


class ResponseTool(ApiModel):
    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: YesNo | None = None
    async_: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = Field(None, alias="async")
    defer_loading: Annotated[Any, Unserved(Reason.ALL_AT_ONCE, False)] = None
    allowed_callers: Annotated[Any, Unserved(Reason.NO_TOOLS, ["direct"], [])] = None
    output_schema: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None


ITEM = one_of("type", MessageItem, ReasoningItem, CallItem, OutputItem, usual="message")
Items = list[Annotated[dict[str, Any], As(ITEM)]]
ResponseTools = list[Annotated[dict[str, Any], As(ResponseTool)]]
