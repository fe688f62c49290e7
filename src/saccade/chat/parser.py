"""An answer as it comes, taken apart: reasoning, then content and calls.

The deltas joined are the same whatever the size of the pieces. Text that could begin a marker waits; white space before
a call waits too, because it belongs to the call. Next: incoming.py, which holds the text; calls.py, which reads calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from secrets import token_hex
from typing import Any

from saccade.chat.calls import CallContext
from saccade.chat.incoming import IncomingText, Reading
from saccade.chat.syntax import THINK, THINK_END, Syntax
from saccade.chat.types import CallDelta, ChatDelta, ContentDelta, ReasoningDelta, UnparsedDelta


class AnswerParser:
    """The ChatParser of every syntax."""

    def __init__(
        self,
        syntax: Syntax,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        new_id: Callable[[], str] = lambda: f"call_{token_hex(12)}",
    ) -> None:
        self._syntax, self._tools, self._new_id = syntax, tools, new_id
        self._is_reasoning = syntax.is_reasoning_open(prompt)
        self._incoming = IncomingText()
        self._deltas: list[ChatDelta] = []
        self._unparsed = ""
        self._blanks = ""  # white space at the end of the content, told when content follows
        self._has_content, self._calls = False, 0
        self._reading: Iterator[None] = self._read()

    def feed(self, text: str) -> list[ChatDelta]:
        self._incoming.text += text
        return self._go_on()

    def finish(self, is_cut: bool = False) -> list[ChatDelta]:
        self._incoming.is_ended, self._incoming.is_cut = True, is_cut
        return self._go_on()

    def _go_on(self) -> list[ChatDelta]:
        next(self._reading, None)
        told, self._deltas = self._deltas, []
        return told

    def _read(self) -> Reading[None]:
        """The whole answer, straight down."""
        incoming, calls = self._incoming, self._syntax.calls if self._tools else None
        if self._syntax.has_reasoning:
            yield from self._read_reasoning()
        if calls is None:
            while not incoming.is_ended:
                self._tell_content(incoming.take(len(incoming.text)))
                yield
            self._tell_content(incoming.take(len(incoming.text)))
        else:
            context = CallContext(incoming, self._tools, self._tell_call, self._tell_unparsed)
            while (yield from incoming.pass_until(calls.begin, self._tell_content)):
                is_block = yield from calls.read(context)
                if is_block:
                    self._blanks = ""
                else:
                    self._tell_content(incoming.take(len(calls.begin)))
            if incoming.text:  # half a marker, cut off
                self._blanks = ""
                self._tell_unparsed(incoming.take(len(incoming.text)))
        if self._blanks and self._has_content:
            self._deltas.append(ContentDelta(self._blanks))
        if self._unparsed:
            self._deltas.append(UnparsedDelta(self._unparsed))

    def _read_reasoning(self) -> Reading[None]:
        """What stands before the content. The opening marker is the prompt's, the model's, or both write one."""
        place = yield from self._incoming.skip_blanks()
        is_opened = yield from self._incoming.starts_with(THINK, place)
        if is_opened and len(self._incoming.text) < place + len(THINK):  # half of it, cut off
            self._tell_unparsed(self._incoming.take(len(self._incoming.text)))
        elif is_opened:
            self._incoming.take(place + len(THINK))
        if is_opened or self._is_reasoning:
            is_closed = yield from self._incoming.pass_until(THINK_END, self._tell_reasoning)
            if is_closed:
                self._incoming.take(len(THINK_END))
            else:
                self._tell_unparsed(self._incoming.take(len(self._incoming.text)))  # half of it, cut off

    def _tell_reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(ReasoningDelta(text))

    def _tell_content(self, text: str) -> None:
        if not self._has_content and self._syntax.drops_breaks and not self._blanks:
            text = text.lstrip("\n")
        text = self._blanks + text
        shown = text.rstrip() if self._tools else text
        self._blanks = text[len(shown) :]
        if shown:
            self._has_content = True
            self._deltas.append(ContentDelta(shown))

    def _tell_call(self, name: str, arguments: str) -> None:
        self._deltas.append(CallDelta(self._calls, self._new_id(), name, arguments))
        self._calls += 1

    def _tell_unparsed(self, text: str) -> None:
        self._unparsed += text
