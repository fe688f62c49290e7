"""Chat templates in Jinja, rendered as transformers does it: sandboxed, with the same filters and globals.

A template is text from a checkpoint: it runs in jinja2's immutable sandbox, and whatever goes wrong in it is one line.
jinja2 is imported when a template is first used. Next: find.py, which finds the templates of a checkpoint.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from saccade.base.printable import shorten
from saccade.chat.messages import check_messages, check_tools, find_thinking
from saccade.chat.parser import AnswerParser
from saccade.chat.syntax import Syntax, find_syntax
from saccade.chat.types import ChatOptions, Message, Tool
from saccade.errors import ConfigError, RequestError

DEFAULT, FOR_TOOLS = "default", "tool_use"  # names of templates that mean something, as in transformers
END_OF_PREFIX = "\ue000end of the prefix\ue000"  # behind an answer that goes on, until it is cut off


class TemplateFormat:
    """The format of a checkpoint that has a chat template, or several by name."""

    stops: tuple[str, ...] = ()

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str], source: str) -> None:
        """`tokens`: special tokens by their role ("bos_token"), which templates write. `source` names it in errors."""
        self._texts, self._tokens, self.name = dict(templates), dict(tokens), source
        self._compiled: dict[str, Any] = {}

    @cached_property
    def syntax(self) -> Syntax:
        """How the model writes reasoning and calls: the markers are in the templates."""
        return find_syntax("\n".join(self._texts.values()))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: ChatOptions = ChatOptions()
    ) -> str:
        """As ChatFormat says. `response_schema` has no place in templates: the caller holds the answer to it."""
        chat, known = check_messages(messages), check_tools(tools)
        name = self._choose(options.template, bool(known))
        variables = dict(options.variables)
        thinking = find_thinking(options)
        if thinking is not None:
            variables |= {"thinking": thinking, "enable_thinking": thinking}
        if options.reasoning_effort is not None:
            variables["reasoning_effort"] = options.reasoning_effort
        if options.continues:
            if chat[-1]["role"] != "assistant":
                raise RequestError(
                    f"expected the last message to be the assistant's, to go on, found {chat[-1]['role']}"
                )
            chat[-1]["content"] += END_OF_PREFIX
        if not self._takes_objects[name]:
            write_arguments(chat)
        given = {"add_generation_prompt": not options.continues, "tools": known or None, "documents": None}
        text = self._run(name, self._tokens | given | variables | {"messages": chat})
        if not options.continues:
            return text
        if (end := text.rfind(END_OF_PREFIX)) < 0:
            raise RequestError(f"{self.name}: the template leaves out the message that should go on")
        return text[:end]

    def new_parser(self, prompt: str, tools: Sequence[Tool] = ()) -> AnswerParser:
        return AnswerParser(self.syntax, prompt, check_tools(tools))

    def open_call(self, prompt: str, name: str | None = None) -> str:
        return self.syntax.open_call(prompt, name)

    def _choose(self, name: str | None, has_tools: bool) -> str:
        if name is None:
            name = FOR_TOOLS if has_tools and FOR_TOOLS in self._texts else DEFAULT
            name = name if name in self._texts or len(self._texts) > 1 else next(iter(self._texts))
        if name not in self._texts:
            raise RequestError(f"{self.name}: expected a template of {', '.join(self._texts)}, found {name!r}")
        return name

    @cached_property
    def _takes_objects(self) -> dict[str, bool]:
        """Of each template, whether it reads the arguments of calls as objects (GLM) or as JSON text (DeepSeek-V3.1).

        A template that reads them wrongly fails, or writes an object as Python does, or a text as JSON in JSON. So a
        chat with one call shows it."""
        return {name: self._probe(name) for name in self._texts}

    def _probe(self, name: str) -> bool:
        call = {"type": "function", "id": "call_0", "function": {"name": "probe", "arguments": {"key": "word"}}}
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        chat.append({"role": "tool", "content": "!", "tool_call_id": "call_0"})
        try:
            text = self._run(name, self._tokens | {"messages": chat, "tools": None, "add_generation_prompt": True})
        except RequestError:
            return False
        return "{'key'" not in text

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        import jinja2

        try:
            if name not in self._compiled:
                self._compiled[name] = make_environment().from_string(self._texts[name])
            return self._compiled[name].render(**variables)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{self.name}: no template that jinja2 reads: line {error.lineno}: {_show(error)}"
            ) from None
        except (RecursionError, MemoryError, Exception) as error:  # a template may raise whatever Python can
            raise RequestError(f"{self.name}: the template refuses these messages: {_show(error)}") from None


def write_arguments(chat: list[dict[str, Any]]) -> None:
    """The arguments of every call as JSON text."""
    for message in chat:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)


def make_environment() -> Any:
    """jinja2's sandbox as transformers sets it up."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model wrote, for training; here its body counts as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _show(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return shorten(re.sub(r"<(\w[\w.]*) object at 0x[0-9a-f]+>", r"\1", text), 200)
