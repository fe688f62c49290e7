"""Requests of Anthropic's API, and what they mean as messages and tools of OpenAI's, which chat formats read.

Next: messages.py, which answers them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.chat.types import ChatOptions
from saccade.server.apis.chat_fields import limit_reasoning
from saccade.server.apis.parts.message_parts import ContextManagement, InputTool, Texts, Turn
from saccade.server.apis.sampling import SamplingFields
from saccade.server.apis.types import ApiModel, Harmless, Number, Reason, Unserved, WholeNumber, YesNo
from saccade.server.chats import ChatQuestion, Constraint, is_answer_begun, require_one
from saccade.server.refusals import ApiError


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
    task_budget: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None


class CountRequest(ApiModel):
    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: Texts | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    cache_control: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    speed: Annotated[Any, Harmless("there is one")] = None
    user_profile_id: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    workspace_id: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    context_management: ContextManagement | None = None
    mcp_servers: Annotated[Any, Unserved(Reason.NO_TOOLS, [])] = None

    def read_question(self, most_tokens: int | None = None) -> ChatQuestion:
        """The request in the shape of OpenAI's messages and tools. `most_tokens`: of the answer."""
        messages, places = list[dict[str, Any]](), list[str]()
        if self.system:
            messages.append({"role": "system", "content": join_texts(self.system)})
            places.append("system")
        for place, message in enumerate(self.messages):
            messages += read_turn(message)
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

    metadata: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    service_tier: Annotated[Any, Harmless("there is one")] = None
    inference_geo: Annotated[Any, Harmless("the server is where it is")] = None
    diagnostics: Annotated[Any, Harmless("tell of the prefix cache alone, and nothing is told")] = None
    billing_policy: Annotated[Any, Harmless("nobody pays")] = None
    betas: Annotated[Any, Harmless("each field says what it needs")] = None
    container: Annotated[Any, Unserved(Reason.NO_TOOLS)] = None
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


def read_tools(tools: Sequence[InputTool]) -> list[dict[str, Any]]:
    found = []
    for tool in tools:
        function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        strict = {} if tool.strict is None else {"strict": tool.strict}
        found.append({"type": "function", "function": {**function, **strict}})
    return found


def read_turn(turn: Turn) -> list[dict[str, Any]]:
    """One message as one or several of OpenAI's: results of tools are messages of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    if turn.role == "assistant":
        return [read_answer(turn.content)]
    results, others = list[dict[str, Any]](), list[Mapping[str, Any]]()
    for block in turn.content:
        if block["type"] == "tool_result":
            content = join_texts(block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content})
        else:
            others.append(block)
    if others or not results:
        results.append({"role": turn.role, "content": join_texts(others)})
    return results


def read_answer(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An answer of the model: thinking, text and calls."""
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for block in blocks:
        if block["type"] == "thinking":
            thoughts.append(block["thinking"])
        elif block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": block.get("input") or {}}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif block["type"] == "text":
            texts.append(block["text"])
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def join_texts(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(map(read_text_block, content))


def read_text_block(block: Mapping[str, Any]) -> str:
    """The text of a block, or of a document with its title."""
    if block["type"] == "text":
        return str(block["text"])
    return "\n".join(part for part in (block.get("title"), block.get("context"), block["source"]["data"]) if part)
