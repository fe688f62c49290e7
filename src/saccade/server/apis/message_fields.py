"""Requests of Anthropic's API, and what they mean as messages and tools of OpenAI's, which chat formats read.

Next: messages.py, which answers them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from saccade.base.values import show
from saccade.chat.types import ChatOptions
from saccade.server.apis.constraints import ResponseFormat
from saccade.server.apis.sampling import SamplingFields
from saccade.server.apis.types import ApiModel, Number, WholeNumber, YesNo
from saccade.server.chats import ChatQuestion, choose_thinking
from saccade.server.refusals import ApiError


class InputMessage(ApiModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class InputTool(ApiModel):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class InputChoice(ApiModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class ThinkingConfig(ApiModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: WholeNumber | None = None


class OutputFormat(ApiModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ApiModel):
    format: OutputFormat | None = None
    effort: str | None = None


class CountRequest(ApiModel):
    model: str | None = None
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def read_question(self) -> ChatQuestion:
        """The request in the shape of OpenAI's messages and tools."""
        messages = list[dict[str, Any]]()
        if self.system:
            messages.append({"role": "system", "content": join_texts(self.system, "system")})
        for place, message in enumerate(self.messages):
            messages += read_message(message, f"messages.{place}")
        variables = dict(self.chat_template_kwargs or {})
        thinking = {"enabled": True, "disabled": False}.get(self.thinking.type) if self.thinking else None
        if self.schema_asked is not None:
            thinking = choose_thinking(thinking, variables)
        options = ChatOptions(
            thinking=thinking,
            reasoning_effort=self.output_config.effort if self.output_config else None,
            response_schema=self.schema_asked,
            continues=messages[-1]["role"] == "assistant",
            variables=variables,
        )
        return ChatQuestion(messages, read_tools(self.tools or ()), self._read_choice(), options)

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        form = (self.output_config.format if self.output_config else None) or self.output_format
        return form.schema_ if form else None

    def _read_choice(self) -> str:
        choice = self.tool_choice
        if choice is None:
            return "auto"
        if choice.type == "tool":
            if choice.name is None:
                raise ApiError(400, 'tool_choice.name: expected the name of a tool with type "tool"', "tool_choice")
            return choice.name
        return {"any": "required"}.get(choice.type, choice.type)


class MessagesRequest(CountRequest):
    max_tokens: WholeNumber = Field(ge=1)
    stream: YesNo | None = None
    stop_sequences: list[str] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: WholeNumber | None = None
    seed: WholeNumber | None = None

    def read_sampling(self) -> SamplingFields:
        form = None
        if self.schema_asked is not None:
            named = {"type": "json_schema", "json_schema": {"schema": self.schema_asked}}
            form = ResponseFormat.model_validate(named)
        fields = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return SamplingFields.model_validate({**fields, "stop": self.stop_sequences, "response_format": form})


def read_tools(tools: Sequence[InputTool]) -> list[dict[str, Any]]:
    found = []
    for place, tool in enumerate(tools):
        if tool.input_schema is None:
            text = f"tools.{place}: {show(tool.type or tool.name)} would run on the server, which runs no tools"
            raise ApiError(400, text, f"tools.{place}")
        function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        found.append({"type": "function", "function": function})
    return found


def read_message(message: InputMessage, where: str) -> list[dict[str, Any]]:
    """One message as one or several of OpenAI's: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [read_answer(message.content, where)]
    results, texts = list[dict[str, Any]](), list[str]()
    for place, block in enumerate(message.content):
        if block.get("type") == "tool_result":
            content = join_texts(block.get("content") or "", f"{where}.content.{place}")
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": content})
        else:
            texts.append(read_text_block(block, f"{where}.content.{place}"))
    if texts or not results:
        results.append({"role": message.role, "content": "\n".join(texts)})
    return results


def read_answer(blocks: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """An answer of the model: thinking, text and calls."""
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for place, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            texts.append(read_text_block(block, f"{where}.content.{place}"))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def join_texts(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise ApiError(400, f"{where}: expected text or a list of blocks, found {show(content)}", where)
    return "\n".join(read_text_block(block, f"{where}.{place}") for place, block in enumerate(content))


def read_text_block(block: Mapping[str, Any], where: str) -> str:
    """The text of a block, or of a document that is text."""
    kind, source = block.get("type"), block.get("source")
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return str(source.get("data", ""))
    raise ApiError(
        400, f"{where}: expected a block of text, found type {show(kind)}; the model reads text alone", where
    )
