"""Chat templates in Jinja, rendered as transformers does it: sandboxed, with the same filters and globals.

A template is text from a checkpoint: it runs in jinja2's immutable sandbox, and whatever goes wrong in it is one line.
jinja2 is imported when a template is first used. Next: find.py, which finds the templates of a checkpoint.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from saccade.base.printable import shorten
from saccade.base.values import show
from saccade.chat.messages import SWITCHES, check_messages, check_tools, find_thinking
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
        self._variables: dict[str, frozenset[str]] = {}

    @cached_property
    def syntax(self) -> Syntax:
        """How the model writes reasoning and calls: the markers are in the templates."""
        return find_syntax("\n".join(self._texts.values()))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: ChatOptions = ChatOptions()
    ) -> str:
        """As ChatFormat says. `response_schema` has no place in templates: the caller makes the answer match it."""
        chat, known = check_messages(messages, options.continues), check_tools(tools)
        name = self._choose(options.template, bool(known))
        variables = dict(options.variables)
        variables |= self._switch(name, options)
        if options.continues:
            chat[-1]["content"] += END_OF_PREFIX
        if "developer" not in self._texts[name]:  # templates pass over roles that they do not know
            chat = [message | {"role": "system"} if message["role"] == "developer" else message for message in chat]
        given = {"add_generation_prompt": not options.continues, "tools": known or None, "documents": None}
        text = self._run(name, self._tokens | given | variables | {"messages": self._forms[name].shape(chat)})
        if not options.continues:
            return text
        if (end := text.rfind(END_OF_PREFIX)) < 0:
            raise RequestError(f"message {len(chat) - 1}: the template {self.name} leaves out what should go on")
        return text[:end]

    def new_parser(self, prompt: str, tools: Sequence[Tool] = ()) -> AnswerParser:
        return AnswerParser(self.syntax, prompt, check_tools(tools))

    def _switch(self, name: str, options: ChatOptions) -> dict[str, Any]:
        """The variables that switch thinking. RequestError for what the template has no variable for."""
        known = self._find_variables(name)
        for variable, value in options.variables.items():
            if value is not None and variable not in known and variable not in SWITCHES:
                raise RequestError(f"chat_template_kwargs: {self.name} has no variable {show(variable)}")
        has_effort, has_switch = "reasoning_effort" in known, bool(known & set(SWITCHES))
        asked = find_thinking(options)
        if asked is not None and not has_switch and not has_effort and asked != self.syntax.has_reasoning:
            told = (
                "cannot be switched off: the model's template has no switch"
                if asked is False
                else "this model has none"
            )
            raise RequestError(f"thinking: {told}")
        if asked is None and options.reasoning_effort is not None and not has_effort:
            if not self.syntax.has_reasoning:
                raise RequestError("reasoning_effort: this model has no thinking")
            asked = True
        asked = options.thinks_unasked if asked is None else asked
        found: dict[str, Any] = {} if asked is None else dict.fromkeys(SWITCHES, asked)
        return found if options.reasoning_effort is None else found | {"reasoning_effort": options.reasoning_effort}

    def _find_variables(self, name: str) -> frozenset[str]:
        """The variables that a template reads; none if it cannot be read, which is told when it is rendered."""
        import jinja2
        from jinja2.meta import find_undeclared_variables

        if name not in self._variables:
            try:
                found = find_undeclared_variables(make_environment().parse(self._texts[name]))
            except (RecursionError, jinja2.TemplateError):
                found = set()
            self._variables[name] = frozenset(found)
        return self._variables[name]

    def _choose(self, name: str | None, has_tools: bool) -> str:
        if name is None:
            name = FOR_TOOLS if has_tools and FOR_TOOLS in self._texts else DEFAULT
            name = name if name in self._texts or len(self._texts) > 1 else next(iter(self._texts))
        if name not in self._texts:
            raise RequestError(f"template: {self.name} has {', '.join(self._texts)}, found {name!r}")
        return name

    @cached_property
    def _forms(self) -> dict[str, "Form"]:
        """How each template wants calls, found by rendering one."""
        return {name: self._find_form(name) for name in self._texts}

    def _find_form(self, name: str) -> "Form":
        """The first form with which the template writes a call whole: with another one it fails, leaves the call out,
        writes an object as Python does, or a text as JSON in JSON."""
        for form in FORMS:
            try:
                text = self._run(name, self._tokens | {"messages": form.shape(PROBE), "add_generation_prompt": True})
            except RequestError:
                continue
            if "probe_name" in text and "probe_value" in text and not re.search(r"""{'|\\"|None""", text):
                return form
        return FORMS[0]

    def check(self) -> None:
        """ConfigError for a template that jinja2 cannot read."""
        for name in self._texts:
            self._compile(name)

    def _compile(self, name: str) -> Any:
        import jinja2

        if name not in self._compiled:
            try:
                self._compiled[name] = make_environment().from_string(self._texts[name])
            except jinja2.TemplateSyntaxError as error:
                text = f"no template that jinja2 reads: line {error.lineno}: {_show(error)}"
                raise ConfigError(f"{self.name}: {text}") from None
            except (RecursionError, MemoryError) as error:
                raise ConfigError(f"{self.name}: no template that jinja2 reads: {_show(error)}") from None
        return self._compiled[name]

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        template = self._compile(name)
        try:
            text: str = template.render(**variables)
            return text
        except (RecursionError, MemoryError, Exception) as error:  # a template may raise whatever Python can
            raise RequestError(f"the template {self.name} refuses these messages: {_show(error)}") from None


@dataclass(frozen=True)
class Form:
    """What a template expects of an answer that calls tools."""

    has_objects: bool  # arguments as objects (GLM), or as JSON text (older ones of DeepSeek)
    empty: str | None  # content where there is none

    def shape(self, chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._shape(message) for message in chat]

    def _shape(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not message.get("tool_calls"):
            return dict(message)
        calls = [call | {"function": self._shape_function(call["function"])} for call in message["tool_calls"]]
        return dict(message) | {"content": message["content"] or self.empty, "tool_calls": calls}

    def _shape_function(self, function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = function["arguments"]
        return dict(function) | {
            "arguments": arguments if self.has_objects else json.dumps(arguments, ensure_ascii=False)
        }


FORMS = tuple(Form(has_objects, empty) for empty in ("", None) for has_objects in (True, False))
PROBE: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "0", "function": {"name": "probe_name", "arguments": {"key": "probe_value"}}}
        ],
    },
    {"role": "tool", "content": "!", "tool_call_id": "0"},
)


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
