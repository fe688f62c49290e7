"""Messages, blocks and tools inside of requests of Anthropic's API. Next: apis/message_fields.py, which reads them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from saccade.base.values import show
from saccade.server.apis.types import ApiModel, As, Harmless, Reason, Unserved, YesNo, one_of

DIRECT = {"type": "direct"}  # a call of the model itself


class Block(ApiModel):
    cache_control: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Annotated[Any, Harmless("of an earlier answer, told to no model")] = None


class TextSource(ApiModel):
    data: str
    type: Annotated[Any, Unserved(Reason.READS_TEXT, "text")] = None
    media_type: Annotated[Any, Unserved(Reason.READS_TEXT, "text/plain")] = None


class Citations(ApiModel):
    enabled: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = None


class DocumentBlock(Block):
    type: Literal["document"]
    source: TextSource
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] | None = None
    caller: Annotated[Any, Unserved(Reason.NO_TOOLS, DIRECT)] = None
    toolset_name: Annotated[Any, Unserved(Reason.NO_TOOLS)] = None


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[dict[str, Any], As(one_of("type", TextBlock, DocumentBlock))]] | None = None
    is_error: Annotated[YesNo | None, Harmless("the content says what failed")] = None
    toolset_name: Annotated[Any, Unserved(Reason.NO_TOOLS)] = None


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: Annotated[Any, Harmless("nothing is signed here")] = None


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: Annotated[Any, Harmless("what another server wrote for itself")] = None


Texts = str | list[Annotated[dict[str, Any], As(TextBlock)]]
ASKED = one_of("type", TextBlock, DocumentBlock, ToolResultBlock)
ANSWERED = one_of("type", TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock)


class UserTurn(ApiModel):
    role: Literal["user"]
    content: str | list[Annotated[dict[str, Any], As(ASKED)]]


class AssistantTurn(ApiModel):
    role: Literal["assistant"]
    content: str | list[Annotated[dict[str, Any], As(ANSWERED)]]


class SystemTurn(ApiModel):
    role: Literal["system"]
    content: Texts


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class InputTool(ApiModel):
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: YesNo | None = None
    cache_control: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    eager_input_streaming: Annotated[Any, Harmless("a call comes whole, which streams may do")] = None
    allowed_callers: Annotated[Any, Unserved(Reason.NO_TOOLS, ["direct"], [])] = None
    defer_loading: Annotated[Any, Unserved(Reason.ALL_AT_ONCE, False)] = None
    input_examples: Annotated[Any, Unserved("write them into the description", [])] = None

    @model_validator(mode="before")
    @classmethod
    def refuse_others(cls, value: Any) -> Any:
        """Tools that are not the client's have no schema, and keys of their own."""
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            text = f"{show(kind)} would run on the server, which runs no tools"
            raise PydanticCustomError("whole", "{text}", {"text": text})
        return value


class Edit(ApiModel):
    """Of a conversation. Which thinking stays is said by the model's format."""

    type: str
    keep: Annotated[Any, Harmless("the format says which reasoning of earlier turns stays")] = None

    @model_validator(mode="before")
    @classmethod
    def refuse_others(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or not kind.startswith("clear_thinking"):
            text = f"no part of a conversation is taken away, found {show(kind)}"
            raise PydanticCustomError("whole", "{text}", {"text": text})
        return value


class ContextManagement(ApiModel):
    edits: list[Edit] | None = None
