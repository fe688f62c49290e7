"""What a chat is made of: messages and options in, deltas out; and what a chat format must do.

Messages and tools are mappings in the shape of OpenAI's chat API, as clients send them; messages.py checks them. Knows
texts only, no tokens. Next: find.py, which finds the format of a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from saccade.chat.syntax import Syntax

Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


@dataclass(frozen=True)
class ChatOptions:
    """How a prompt is rendered.

    - `thinking`: whether the model is asked to think; None: as the format does by itself.
    - `thinks_unasked`: the same where nobody says; None: as the format does.
    - `reasoning_effort`: a word such as "high", for the templates that have it.
    - `response_schema`: a JSON schema of the answer, for the formats that tell it to the model.
    - `continues`: the last message is the beginning of the answer and stays open.
    - `template`: which of several templates, by name; None: the one for the case at hand.
    - `variables`: further variables of a template (`chat_template_kwargs`).
    - `tool_choice`: "auto", "none", or "required": the answer is a call.
    - `allowed_tools`: names of the tools that may be called; None: all of them.
    - `parallel_tool_calls`: False: one call at most.
    - `reasoning_limit`: tokens of reasoning, at most; None: any number.
    """

    thinking: bool | None = None
    thinks_unasked: bool | None = None
    reasoning_effort: str | None = None
    response_schema: Mapping[str, Any] | None = None
    continues: bool = False
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    tool_choice: str = "auto"
    allowed_tools: tuple[str, ...] | None = None
    parallel_tool_calls: bool = True
    reasoning_limit: int | None = None


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A whole call of a tool. A call is told when it is complete: half of one, cut off by a limit, is no call."""

    index: int  # among the calls of this answer, from 0
    id: str
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True)
class UnparsedDelta:
    """At the end of an answer: text that began as a call and is none, cut off or not as the format wants it. Also half
    a marker, cut off."""

    text: str


ChatDelta = ContentDelta | ReasoningDelta | CallDelta | UnparsedDelta


class ChatParser(Protocol):
    """The deltas of one answer. Text may come in pieces of any size; the deltas joined are the same."""

    def feed(self, text: str) -> list[ChatDelta]:
        """What is certain now and was not before. Text that could begin a marker is held back."""
        ...

    def finish(self, is_cut: bool = False) -> list[ChatDelta]:
        """The rest, at the end of the answer. `is_cut`: a limit ended it, so that half a marker is no text."""
        ...


class ChatFormat(Protocol):
    """How one model writes chats. RequestError for messages that it cannot write."""

    @property
    def name(self) -> str:
        """For people: "DeepSeek-V3.2", "chat_template.jinja"."""
        ...

    @property
    def syntax(self) -> Syntax:
        """How the model writes reasoning and calls."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """Markers at which an answer ends, beside the model's end tokens."""
        ...

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: ChatOptions = ...) -> str:
        """The text of the prompt. It has every special token, the first one too: encode it without adding any."""
        ...

    def new_parser(self, prompt: str, tools: Sequence[Tool] = ()) -> ChatParser:
        """A parser of the answer to `prompt`, whose end says whether the answer begins with reasoning. Without `tools`
        no calls are looked for. The text must keep the markers that are special tokens."""
        ...
