"""Requests of Anthropic's API, and what they mean as messages and tools of OpenAI's, which chat formats read.

Next: messages.py, which answers them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.base.values import show
from saccade.chat.types import ChatOptions
from saccade.server.apis.chat_fields import limit_reasoning
from saccade.server.apis.sampling import FOUND_ANYWAY, NOBODY_LOOKS, NOT_SUPPORTED, SamplingFields
from saccade.server.apis.types import ApiModel, Harmless, Number, Unserved, WholeNumber, YesNo
from saccade.server.chats import ChatQuestion, Constraint, is_answer_begun, require_one
from saccade.server.refusals import ApiError

NO_TOOLS = "the server runs no tools"


class InputMessage(ApiModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class InputTool(ApiModel):
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: YesNo | None = None
    cache_control: Annotated[Any, Harmless(FOUND_ANYWAY)] = None
    eager_input_streaming: Annotated[Any, Harmless("a call comes whole, which streams may do")] = None
    allowed_callers: Annotated[Any, Unserved(NO_TOOLS, ["direct"], [])] = None
    defer_loading: Annotated[Any, Unserved("the model hears of all tools at once", False)] = None
    input_examples: Annotated[Any, Unserved("write them into the description", [])] = None


class InputChoice(ApiModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: YesNo | None = None


class ThinkingConfig(ApiModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: WholeNumber | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(ApiModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ApiModel):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    task_budget: Annotated[Any, Unserved(NOT_SUPPORTED)] = None


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

    cache_control: Annotated[Any, Harmless(FOUND_ANYWAY)] = None
    speed: Annotated[Any, Harmless("there is one")] = None
    user_profile_id: Annotated[Any, Harmless(NOBODY_LOOKS)] = None
    workspace_id: Annotated[Any, Harmless(NOBODY_LOOKS)] = None
    context_management: dict[str, Any] | None = None
    mcp_servers: Annotated[Any, Unserved(NO_TOOLS, [])] = None

    def read_question(self, most_tokens: int | None = None) -> ChatQuestion:
        """The request in the shape of OpenAI's messages and tools. `most_tokens`: of the answer."""
        check_edits(self.context_management)
        messages, places = list[dict[str, Any]](), list[str]()
        if self.system:
            messages.append({"role": "system", "content": join_texts(self.system, "system")})
            places.append("system")
        for place, message in enumerate(self.messages):
            messages += read_message(message, f"messages.{place}")
            places += [f"messages.{place}"] * (len(messages) - len(places))
        thinking, constraint = self.thinking, self._find_constraint()
        options = ChatOptions(
            thinking=thinking.type != "disabled" if thinking else None,
            thinks_unasked=False,
            reasoning_effort=self.output_config.effort if self.output_config else None,
            response_schema=constraint.value if constraint else None,
            continues=is_answer_begun(messages),
            variables=dict(self.chat_template_kwargs or {}),
            reasoning_limit=limit_reasoning(thinking.budget_tokens if thinking else None, most_tokens),
        )
        names = {"reasoning_effort": "output_config.effort", "stop": "stop_sequences", "prompt": "messages"}
        return ChatQuestion(messages, read_tools(self.tools or ()), self._choose(options), constraint, places, names)

    def _find_constraint(self) -> Constraint | None:
        asked = self.output_config.format if self.output_config else None
        if asked is not None and self.output_format is not None:
            raise ApiError(400, "output_format: expected it, or output_config.format; found both", "output_format")
        form, field = (asked, "output_config.format") if asked else (self.output_format, "output_format")
        return Constraint("json_schema", form.schema_, f"{field}.schema") if form else None

    def _choose(self, options: ChatOptions) -> ChatOptions:
        choice = self.tool_choice
        if choice is None:
            return options
        if (choice.name is None) == (choice.type == "tool"):
            raise ApiError(
                400, 'tool_choice.name: expected the name of a tool with type "tool" only', "tool_choice.name"
            )
        if choice.name is not None:
            return require_one(options, choice.name)
        is_parallel, named = not choice.disable_parallel_tool_use, {"any": "required"}.get(choice.type, choice.type)
        return replace(options, tool_choice=named, parallel_tool_calls=is_parallel)


class MessagesRequest(CountRequest):
    max_tokens: WholeNumber = Field(ge=1)
    stream: YesNo | None = None
    stop_sequences: list[str] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: WholeNumber | None = None
    seed: WholeNumber | None = None

    metadata: Annotated[Any, Harmless(NOBODY_LOOKS)] = None
    service_tier: Annotated[Any, Harmless("there is one")] = None
    inference_geo: Annotated[Any, Harmless("the server is where it is")] = None
    diagnostics: Annotated[Any, Harmless("tell of the prefix cache alone, and nothing is told")] = None
    billing_policy: Annotated[Any, Harmless("nobody pays")] = None
    betas: Annotated[Any, Harmless("each field says what it needs")] = None
    container: Annotated[Any, Unserved(NO_TOOLS)] = None
    compaction: Annotated[Any, Unserved("no conversation is cut")] = None
    fallbacks: Annotated[Any, Unserved("there is one model", [])] = None
    fallback_credit_token: Annotated[Any, Unserved("there is one model")] = None
    thread: Annotated[Any, Unserved("no conversation is kept")] = None

    @property
    def hides_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"

    def read_sampling(self) -> SamplingFields:
        fields = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return SamplingFields.model_validate({**fields, "stop": self.stop_sequences})


def check_edits(management: Mapping[str, Any] | None) -> None:
    """Refuse what would take parts of a conversation away; which thinking stays is said by the model's format."""
    for name, value in (management or {}).items():
        edits = value if name == "edits" and isinstance(value, list) else [value]
        kinds = [edit.get("type") if isinstance(edit, Mapping) else edit for edit in edits]
        for kind in kinds:
            if not isinstance(kind, str) or not kind.startswith("clear_thinking"):
                where = "context_management"
                raise ApiError(400, f"{where}: no part of a conversation is taken away, found {show(kind)}", where)


def read_tools(tools: Sequence[InputTool]) -> list[dict[str, Any]]:
    found = []
    for place, tool in enumerate(tools):
        if tool.type not in (None, "custom") or tool.input_schema is None:
            text = f"tools.{place}: {show(tool.type or tool.name)} would run on the server, which runs no tools"
            raise ApiError(400, text, f"tools.{place}")
        function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        strict = {} if tool.strict is None else {"strict": tool.strict}
        found.append({"type": "function", "function": {**function, **strict}})
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
    kind, source, citations = block.get("type"), block.get("source"), block.get("citations")
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if isinstance(citations, Mapping) and citations.get("enabled"):
        raise ApiError(400, f"{where}.citations: not supported; expected none", f"{where}.citations")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return "\n".join(str(part) for part in (block.get("title"), block.get("context"), source.get("data")) if part)
    raise ApiError(
        400, f"{where}: expected a block of text, found type {show(kind)}; the model reads text alone", where
    )
