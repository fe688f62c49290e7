"""Requests of OpenAI's Responses API, and what they mean as chat messages. Next: responses.py, which answers them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from saccade.base.values import show
from saccade.chat.types import ChatOptions
from saccade.server.apis.constraints import ResponseFormat, find_constraint
from saccade.server.apis.sampling import SamplingFields, refuse_field
from saccade.server.apis.types import ApiModel, Number, WholeNumber, YesNo
from saccade.server.chats import ChatQuestion, choose_thinking
from saccade.server.refusals import ApiError


class TextFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(ApiModel):
    format: TextFormat | None = None


class ReasoningConfig(ApiModel):
    effort: str | None = None


class NamedChoice(ApiModel):
    type: Literal["function"]
    name: str


class ResponsesRequest(ApiModel):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    max_output_tokens: WholeNumber | None = Field(None, ge=1)
    temperature: Number | None = None
    top_p: Number | None = None
    seed: WholeNumber | None = None
    stream: YesNo | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: YesNo | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse by name what would need answers that are kept."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise refuse_field(name, "responses are not kept; send the whole conversation as input")
        if self.background:
            raise refuse_field("background", "not supported; expected none, or false")

    def read_sampling(self) -> SamplingFields:
        form, asked = None, self.text.format if self.text else None
        if asked is not None:
            schema = {"schema": asked.schema_} if asked.schema_ is not None else None
            form = ResponseFormat.model_validate({"type": asked.type, "json_schema": schema})
        fields = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return SamplingFields.model_validate({**fields, "response_format": form})

    def read_question(self) -> ChatQuestion:
        variables = dict(self.chat_template_kwargs or {})
        is_bound = bool(find_constraint(self.read_sampling()))
        asked = self.text.format if self.text else None
        options = ChatOptions(
            thinking=choose_thinking(None, variables) if is_bound else None,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            response_schema=asked.schema_ if asked else None,
            variables=variables,
        )
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += read_items(self.input)
        choice = self.tool_choice or "auto"
        name = choice.name if isinstance(choice, NamedChoice) else choice
        return ChatQuestion(messages, read_functions(self.tools or ()), name, options)


def read_functions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for place, tool in enumerate(tools):
        if tool.get("type") != "function":
            text = f"tools.{place}: type {show(tool.get('type'))} would run on the server, which runs no tools"
            raise ApiError(400, text, f"tools.{place}")
        function = {key: value for key, value in tool.items() if key in ("name", "description", "parameters")}
        found.append({"type": "function", "function": function})
    return found


def read_items(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items of a conversation as chat messages: what the model said in several items is one message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages = list[dict[str, Any]]()

    def answer() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for place, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input.{place}"
        if kind == "message":
            role, content = item.get("role"), join_content(item.get("content"), where)
            if role == "assistant":
                answer()["content"] += content
            else:
                messages.append({"role": role, "content": content})
        elif kind == "reasoning":
            thought = join_content(item.get("content") or item.get("summary") or "", where)
            answer()["reasoning_content"] = answer().get("reasoning_content", "") + thought
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            answer().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = join_content(item.get("output") or "", where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            text = (
                f"{where}: type {show(kind)} is not supported; expected message, reasoning, function_call or its output"
            )
            raise ApiError(400, text, where)
    if not messages:
        raise refuse_field("input", "expected text, or items: one at least")
    return messages


def join_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content: expected text or a list of parts, found {show(content)}", where)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            found = part.get("type") if isinstance(part, Mapping) else part
            raise ApiError(400, f"{where}.content: expected parts of text, found {show(found)}", where)
        texts.append(text)
    return "".join(texts)
