"""An answer as a whole: its deltas joined. Next: parser.py, which makes them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from saccade.chat.types import CallDelta, ChatDelta, ContentDelta, ReasoningDelta


@dataclass
class ChatAnswer:
    """What the deltas so far amount to.

    - `content`, `reasoning`: texts, "" if there is none.
    - `calls`: the calls of tools, whole.
    - `unparsed`: text that began as a call and is none.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    unparsed: str = ""

    def add(self, deltas: Iterable[ChatDelta]) -> None:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self.content += delta.text
            elif isinstance(delta, ReasoningDelta):
                self.reasoning += delta.text
            elif isinstance(delta, CallDelta):
                self.calls.append(delta)
            else:
                self.unparsed += delta.text

    def to_message(self) -> dict[str, Any]:
        """The message that stands for it in what is asked next."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        elif self.content == "" and self.unparsed:
            message["content"] = self.unparsed  # an empty message would hide what the model tried
        return message
