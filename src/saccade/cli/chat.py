"""`saccade chat`: a conversation on the terminal, or with lines from a pipe.

The answer goes to stdout as it comes, what the model thinks before dim; everything else goes to stderr. Next:
api/chat.py, which answers.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.base.near import find_near
from saccade.base.values import show_count
from saccade.chat.find import find_chat_format
from saccade.chat.types import CallDelta, ChatOptions, ContentDelta, ReasoningDelta
from saccade.cli.interrupt import handled
from saccade.cli.options import (
    ARITHMETIC,
    DEFAULT_MODEL,
    DRAFTS,
    PLACE,
    ModelOption,
    takes_model,
)
from saccade.cli.prompts import read_text
from saccade.cli.run import open_llm
from saccade.cli.sampling import takes_sampling
from saccade.cli.terminal import reports, say, show_answer
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError

if TYPE_CHECKING:
    from saccade.api.chat import ChatStream
    from saccade.api.llm import LLM
    from saccade.api.loading.prepare import PreparedModel

DIM, PLAIN_AGAIN = "\x1b[2m", "\x1b[22m"
HELP = "/new forgets the conversation, /exit or Ctrl-D ends; Ctrl-C ends the answer, and again the chat"
COMMANDS = {"/new": "/new", "/exit": "/exit", "/quit": "/exit", "/help": "/help", "/?": "/help"}
COMMAND = re.compile(r"/[a-z?]+")  # /etc/hosts is none
HAS_NO_COLOR = "NO_COLOR"  # https://no-color.org


@dataclass
class Conversation:
    """What was said so far, and how to go on."""

    llm: "LLM"
    system: str
    params: SamplingParams
    options: ChatOptions
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> "ChatStream":
        """The answer as it comes. A question that is refused is not kept."""
        asked = {"role": "user", "content": text}
        stream = self.llm.stream_chat([*self.messages, asked], params=self.params, options=self.options)
        self.messages.append(asked)
        return stream

    def keep(self, message: dict[str, Any]) -> None:
        self.messages.append(message)


@reports(2)
@takes_sampling
@takes_model(*PLACE, *ARITHMETIC, *DRAFTS)
def chat(
    *,
    model: ModelOption = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    system_file: Annotated[
        str | None, typer.Option("--system-file", metavar="FILE", help="The same from a file.")
    ] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Whether the model thinks first. Default: its own.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option("--effort", help="How much it thinks, for models that are told.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja file in place of the model's.")
    ] = None,
    sampling: Callable[[], SamplingParams] = SamplingParams,
    how: dict[str, Any],
) -> None:
    """Talk to a model: a line is a question. What it thinks first is dim. /new forgets, /exit ends."""
    if system is not None and system_file is not None:
        raise RequestError("chat: --system and --system-file are one option; expected one of them, found both")
    params = sampling()
    told = read_text(system_file, "--system-file") if system_file is not None else system or ""
    given = None if template is None else read_text(template, "--chat-template")
    options = ChatOptions(thinking=thinking, reasoning_effort=effort)

    def require_format(made: "PreparedModel") -> None:
        """Before weights are fetched or loaded."""
        found = find_chat_format(made.source.directory, made.config.model_type, given)
        made.check(made.encode("?"), params)
        found.render([{"role": "user", "content": "?"}], (), options)

    llm, loaded = open_llm(model, how, require_format)
    if given is not None:
        llm.chat_format = find_chat_format(Path(llm.settings.path), llm.config.model_type, given)
    say(loaded)
    talk(Conversation(llm, told, params, options))


def talk(conversation: Conversation) -> None:
    """Questions and answers until the input ends."""
    is_watched = sys.stdin is not None and sys.stdin.isatty()
    if is_watched:
        say(f"{HELP}\n")
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys edit the line, and bring back what was typed before
    for number in count(1):
        try:
            line = read_line(is_watched, number)
            if line is None or take_line(conversation, line) == "/exit":
                return
        except RequestError as error:
            if not is_watched:
                raise
            say(f"saccade: {error}")


def read_line(is_watched: bool, number: int) -> str | None:
    """What is typed next, or the next line of a pipe; None at the end. RequestError for a line that is not UTF-8."""
    try:
        if is_watched:
            line = input("> ")
            line.encode()  # bytes that are no text come as surrogates, or as the error that is caught here
            return line
        raw = b"" if sys.stdin is None else getattr(sys.stdin, "buffer", sys.stdin).readline()
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(raw, bytes) else raw
        return line or None
    except EOFError:
        say("")
        return None
    except UnicodeError as error:
        place = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "a byte"
        raise RequestError(f"standard input: {place} of line {number} is no text in UTF-8") from None


def take_line(conversation: Conversation, line: str) -> str:
    """Answer a question, or do what a command says; the command, "" for a question. RequestError for a command that
    there is not: behind a space it is a question."""
    text = line.strip()
    word = text.split(maxsplit=1)[0] if text else ""
    if not (line.startswith("/") and COMMAND.fullmatch(word)):
        if text:
            answer_line(conversation, text)
        return ""
    meant = COMMANDS.get(word)
    if meant is None:
        near = find_near(word, COMMANDS) or list(COMMANDS)
        raise RequestError(f"chat: there is no {word}; expected {' or '.join(near)}, or a space before a question")
    if meant == "/new":
        conversation.forget()
        say("the conversation is forgotten")
    elif meant == "/help":
        say(HELP)
    return meant


def answer_line(conversation: Conversation, text: str) -> None:
    """Ask, show the answer as it comes, and say how fast it was. Ctrl-C ends the answer, what was said is kept."""
    start, first, tokens, reason = time.perf_counter(), 0.0, 0, "interrupted"
    shown = Screen(sys.stdout is not None and sys.stdout.isatty() and HAS_NO_COLOR not in os.environ)
    stream = conversation.ask(text)
    try:
        with handled(end_answer):
            for piece in stream:
                first = first or time.perf_counter()
                tokens += len(piece.token_ids)
                for delta in piece.deltas:
                    if isinstance(delta, ReasoningDelta):
                        shown.show(delta.text, is_dim=True)
                    elif isinstance(delta, ContentDelta):
                        shown.show(delta.text)
                    elif isinstance(delta, CallDelta):
                        shown.show(f"{delta.name}({delta.arguments})\n")
                reason = piece.finish_reason or reason
    except KeyboardInterrupt:
        pass
    finally:
        stream.close()
        shown.end()
    conversation.keep(stream.answer.to_message())
    say(describe_speed(tokens, len(stream.prompt_token_ids), first - start, time.perf_counter() - first, reason))


def describe_speed(tokens: int, prompt: int, wait: float, seconds: float, reason: str) -> str:
    """Like: 42 tokens, 85.1 tokens/s; the first after 0.12 s, behind 310 of the prompt."""
    if not tokens:
        return f"no answer: {reason}"
    rate = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    end = "" if reason == "stop" else f"; {reason}"
    return f"{show_count(tokens, 'token')}{rate}; the first after {wait:.2f} s, behind {prompt:,} of the prompt{end}"


class Screen:
    """What stands on the screen: dim or not, and whether its last line is whole."""

    def __init__(self, has_color: bool) -> None:
        self._has_color, self._is_dim, self._last = has_color, False, "\n"

    def show(self, text: str, is_dim: bool = False) -> None:
        if is_dim != self._is_dim:
            self.end()
            self._switch(is_dim)
        if text:
            show_answer(text)
            self._last = text[-1]

    def end(self) -> None:
        """End the line, and what is dim."""
        self._switch(False)
        if self._last != "\n":
            show_answer("\n")
            self._last = "\n"

    def _switch(self, is_dim: bool) -> None:
        if self._has_color and is_dim != self._is_dim:
            print(DIM if is_dim else PLAIN_AGAIN, end="", flush=True)
        self._is_dim = is_dim


def end_answer(number: int, frame: FrameType | None) -> None:
    """Ctrl-C during an answer; at the prompt again, it ends the chat."""
    raise KeyboardInterrupt
