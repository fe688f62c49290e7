"""Requests of chats as OpenAI's clients and those of other engines send them, and what they mean.

Next: chat.py, which answers them; chats.py, what a question is.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.chat.types import ChatOptions
from saccade.server.apis.constraints import find_constraint
from saccade.server.apis.parts.chat_parts import ChatMessages, ChatTools
from saccade.server.apis.sampling import FORMAT_WRITES, MOST_LOGPROBS, SamplingFields, refuse_field
from saccade.server.apis.types import ApiModel, Harmless, Reason, Unserved, WholeNumber, YesNo
from saccade.server.chats import ChatQuestion, is_answer_begun, require_one

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TEXT_ALONE = "the model writes text alone"


class ThinkingSwitch(ApiModel):
    """As the APIs of DeepSeek and GLM have it, and Anthropic's."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: WholeNumber | None = Field(None, ge=1)
    clear_thinking: Annotated[Any, Unserved("the format says which reasoning of earlier turns stays")] = None


class ChosenFunction(ApiModel):
    name: str


class ChosenTool(ApiModel):
    """One tool, which must be called."""

    type: Literal["function"]
    function: ChosenFunction

    def narrow(self, options: ChatOptions) -> ChatOptions:
        return require_one(options, self.function.name)


class AllowedTools(ApiModel):
    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1)


class ChosenTools(ApiModel):
    """Some tools of those that the model knows."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def narrow(self, options: ChatOptions) -> ChatOptions:
        names = tuple(tool.function.name for tool in self.allowed_tools.tools)
        return replace(options, tool_choice=self.allowed_tools.mode, allowed_tools=names)


class ChatRequest(SamplingFields):
    messages: ChatMessages = Field(min_length=1)
    tools: ChatTools | None = None
    tool_choice: Literal["auto", "none", "required"] | ChosenTool | ChosenTools | None = None
    parallel_tool_calls: YesNo | None = None
    max_tokens: WholeNumber | None = Field(None, ge=1)
    max_completion_tokens: WholeNumber | None = Field(None, ge=1)
    logprobs: YesNo | None = None
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=MOST_LOGPROBS)
    thinking: YesNo | ThinkingSwitch | None = None
    enable_thinking: YesNo | None = None
    reasoning_effort: Effort | None = None
    thinking_token_budget: WholeNumber | None = Field(None, ge=-1)
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: YesNo | None = None
    add_generation_prompt: YesNo | None = None

    store: Annotated[Any, Harmless("nothing is kept")] = None
    prediction: Annotated[Any, Harmless("a guess of the answer would make it faster, not another one")] = None
    service_tier: Annotated[Any, Harmless("there is one")] = None
    prompt_cache_key: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    prompt_cache_options: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    prompt_cache_retention: Annotated[Any, Harmless(Reason.FOUND_ANYWAY)] = None
    safety_identifier: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    include_reasoning: Annotated[Any, Unserved("reasoning stands apart in any case", True)] = None
    separate_reasoning: Annotated[Any, Unserved("reasoning stands apart in any case", True)] = None
    skip_special_tokens: Annotated[Any, Unserved("markers are taken out, other special tokens stay", False)] = None
    audio: Annotated[Any, Unserved(TEXT_ALONE)] = None
    modalities: Annotated[Any, Unserved(TEXT_ALONE, ["text"], [])] = None
    functions: Annotated[Any, Unserved("of an older API; use tools", [])] = None
    function_call: Annotated[Any, Unserved("of an older API; use tool_choice")] = None
    verbosity: Annotated[Any, Unserved("models here have one", "medium")] = None
    moderation: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None
    web_search_options: Annotated[Any, Unserved("the server runs no tools")] = None
    echo: Annotated[Any, Unserved("of completions", False)] = None
    add_special_tokens: Annotated[Any, Unserved(FORMAT_WRITES, False)] = None
    chat_template: Annotated[Any, Unserved("the server has one: --chat-template")] = None
    documents: Annotated[Any, Unserved("write them into messages", [])] = None
    return_prompt_text: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = None

    def read_question(self) -> ChatQuestion:
        schema = self.response_format.json_schema if self.response_format else None
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise refuse_field("max_completion_tokens", f"expected it, or max_tokens ({self.max_tokens}); they differ")
        options = ChatOptions(
            thinking=self._find_thinking(),
            reasoning_effort=self.reasoning_effort,
            response_schema=schema.schema_ if schema else None,
            continues=self._find_continues(),
            variables=self._find_variables(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            reasoning_limit=self._find_budget(),
        )
        choice = self.tool_choice or "auto"
        options = replace(options, tool_choice=choice) if isinstance(choice, str) else choice.narrow(options)
        names = {"prompt": "messages"}
        if self.max_tokens is None and self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return ChatQuestion(self.messages, self.tools or (), options, find_constraint(self), (), names)

    def _find_continues(self) -> bool:
        """Whether the last message goes on: the assistant's does, unless the request says otherwise."""
        asked = self.continue_final_message
        if self.add_generation_prompt is not None:
            if asked == self.add_generation_prompt:
                raise refuse_field("add_generation_prompt", "expected the opposite of continue_final_message")
            asked = not self.add_generation_prompt
        return is_answer_begun(self.messages) if asked is None else asked

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def _find_thinking(self) -> bool | None:
        return self.thinking.type != "disabled" if isinstance(self.thinking, ThinkingSwitch) else self.thinking

    def _find_budget(self) -> int | None:
        """How many tokens may be reasoning; None: any number."""
        budget = self.thinking_token_budget
        if isinstance(self.thinking, ThinkingSwitch) and self.thinking.budget_tokens is not None:
            budget = self.thinking.budget_tokens
        return limit_reasoning(budget, self.most_tokens)

    def _find_variables(self) -> dict[str, Any]:
        variables = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            variables.setdefault("enable_thinking", self.enable_thinking)
        return variables

    def count_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise refuse_field("top_logprobs", "allowed with logprobs=true only")
            return None
        return self.top_logprobs or 0


def limit_reasoning(budget: int | None, most: int | None) -> int | None:
    """A limit on the tokens of reasoning; None without one, or if an answer of `most` tokens cannot reach it."""
    if budget is None or budget < 0 or (most is not None and budget + 1 >= most):
        return None
    return budget
