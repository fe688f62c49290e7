"""Requests of OpenAI's Responses API, and what they mean as chat messages. Next: responses.py, which answers them."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.base.values import show
from saccade.chat.types import ChatOptions
from saccade.server.apis.chat_fields import Effort
from saccade.server.apis.parts.response_parts import Items, ResponseTools
from saccade.server.apis.sampling import SamplingFields, refuse_field
from saccade.server.apis.types import ApiModel, Harmless, Number, Reason, Unserved, WholeNumber, YesNo
from saccade.server.chats import ChatQuestion, Constraint, is_answer_begun, require_one
from saccade.server.refusals import ApiError

NOTHING_KEPT = "responses are not kept; send the whole conversation as input"
REASONING_BACK = "reasoning.encrypted_content"


class TextFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: YesNo | None = None

    def find_constraint(self) -> Constraint | None:
        field = "text.format.schema"
        if (self.schema_ is None) == (self.type == "json_schema"):
            raise ApiError(400, f'{field}: expected a JSON schema with type "json_schema" only', field)
        if self.type == "text":
            return None
        return Constraint("json_schema", {"type": "object"} if self.schema_ is None else self.schema_, field)


class TextConfig(ApiModel):
    format: TextFormat | None = None
    verbosity: Annotated[Any, Unserved("models here have one", "medium")] = None


class ReasoningConfig(ApiModel):
    effort: Effort | None = None
    summary: Annotated[Any, Harmless("reasoning comes whole")] = None
    generate_summary: Annotated[Any, Harmless("reasoning comes whole")] = None
    context: Annotated[Any, Unserved("the format says which reasoning of earlier turns stays", "auto")] = None
    mode: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, "standard")] = None


class NamedChoice(ApiModel):
    type: Literal["function"]
    name: str

    def narrow(self, options: ChatOptions) -> ChatOptions:
        return require_one(options, self.name)


class AllowedChoice(ApiModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1)

    def narrow(self, options: ChatOptions) -> ChatOptions:
        names = tuple(tool.name for tool in self.tools)
        return replace(options, tool_choice=self.mode, allowed_tools=names)


class ResponseStreamOptions(ApiModel):
    include_obfuscation: Annotated[Any, Harmless("events are never padded")] = None


class ResponsesRequest(ApiModel):
    input: str | Items
    model: str | None = None
    instructions: str | None = None
    tools: ResponseTools | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: YesNo | None = None
    max_output_tokens: WholeNumber | None = Field(None, ge=1)
    temperature: Number | None = None
    top_p: Number | None = None
    seed: WholeNumber | None = None
    stream: YesNo | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    store: Annotated[Any, Harmless("nothing is kept, and the answer says so")] = None
    stream_options: Annotated[ResponseStreamOptions | None, Harmless("events are never padded")] = None
    user: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    safety_identifier: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    service_tier: Annotated[Any, Harmless("there is one")] = None
    prompt_cache_key: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    prompt_cache_options: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    prompt_cache_retention: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    max_tool_calls: Annotated[Any, Harmless("of tools that run on a server, and this one runs none")] = None
    previous_response_id: Annotated[Any, Unserved(NOTHING_KEPT)] = None
    conversation: Annotated[Any, Unserved(NOTHING_KEPT)] = None
    background: Annotated[Any, Unserved(NOTHING_KEPT, False)] = None
    background_options: Annotated[Any, Unserved(NOTHING_KEPT)] = None
    prompt: Annotated[Any, Unserved("no prompts are kept here")] = None
    context_management: Annotated[Any, Unserved("no part of a conversation is taken away", [])] = None
    truncation: Annotated[Any, Unserved("no part of a conversation is taken away", "disabled")] = None
    top_logprobs: Annotated[Any, Unserved("use /v1/chat/completions", 0)] = None
    moderation: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None
    image: Annotated[Any, Unserved("the model writes text alone")] = None
    access_programs: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None

    @property
    def shows_reasoning_back(self) -> bool:
        return REASONING_BACK in (self.include or ())

    def read_sampling(self) -> SamplingFields:
        fields = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return SamplingFields.model_validate(fields)

    def read_question(self) -> ChatQuestion:
        form = self.text.format if self.text else None
        constraint = form.find_constraint() if form else None
        options = ChatOptions(
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            response_schema=form.schema_ if form else None,
            variables=dict(self.chat_template_kwargs or {}),
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        places = ["instructions"] if self.instructions else []
        for place, message in read_items(self.input):
            messages.append(message)
            places.append(place)
        choice = self.tool_choice or "auto"
        options = replace(options, tool_choice=choice) if isinstance(choice, str) else choice.narrow(options)
        options = replace(options, continues=is_answer_begun(messages))
        names = {"reasoning_effort": "reasoning.effort", "max_tokens": "max_output_tokens", "prompt": "input"}
        return ChatQuestion(messages, read_functions(self.tools or ()), options, constraint, places, names)


FUNCTION = ("name", "description", "parameters", "strict")


def read_functions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    functions = [{name: tool[name] for name in FUNCTION if tool.get(name) is not None} for tool in tools]
    return [{"type": "function", "function": function} for function in functions]


def read_items(items: str | Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Items of a conversation as chat messages, with the place of each: what the model said in several items is one."""
    if isinstance(items, str):
        return [("input", {"role": "user", "content": items})]
    messages = list[tuple[str, dict[str, Any]]]()

    def answer() -> dict[str, Any]:
        if not messages or messages[-1][1]["role"] != "assistant":
            messages.append((where, {"role": "assistant", "content": ""}))
        return messages[-1][1]

    for place, item in enumerate(items):
        kind, where = item.get("type") or "message", f"input.{place}"
        if kind == "message":
            role, content = item["role"], join_content(item["content"])
            if role == "assistant":
                answer()["content"] += content
            else:
                messages.append((where, {"role": role, "content": content}))
        elif kind == "reasoning":
            thought = read_reasoning(item, where)
            answer()["reasoning_content"] = answer().get("reasoning_content", "") + thought
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            answer().setdefault("tool_calls", []).append(call)
        else:
            output = join_content(item.get("output"))
            messages.append((where, {"role": "tool", "tool_call_id": item["call_id"], "content": output}))
    if not messages:
        raise refuse_field("input", "expected text, or items: one at least")
    return messages


def read_reasoning(item: Mapping[str, Any], where: str) -> str:
    """What the model thought, as this server told it."""
    told = item.get("encrypted_content")
    if item.get("content") or not told:
        return join_content(item.get("content") or item.get("summary"))
    try:
        return base64.b64decode(told, validate=True).decode()
    except (TypeError, binascii.Error, UnicodeDecodeError):
        where = f"{where}.encrypted_content"
        raise ApiError(400, f"{where}: expected what this server wrote, found {show(told)}", where) from None


def join_content(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
