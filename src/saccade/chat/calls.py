"""How models write calls of tools: one class a syntax, each a reader of one block of calls, and the grammar of one.

A reader tells a call when its end has come. Markers may stand inside of an argument: what ends an argument is its own
closing marker alone. Next: syntax.py for which model writes which; schema.py for values; rules.py, which holds answers
to such a grammar.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from saccade.chat.incoming import IncomingText, Reading
from saccade.chat.schema import TOOL_NAME, find_types, read_strictly, strip_value, write_json, write_value

TagPart = dict[str, Any]  # of a structural tag of xgrammar


@dataclass(frozen=True)
class CallContext:
    """What a reader of calls is given: the text, the tools on offer, and whom to tell."""

    incoming: IncomingText
    tools: Sequence[Mapping[str, Any]]
    tell_call: Callable[[str, str], None]  # name, arguments as JSON
    tell_unparsed: Callable[[str], None]


class CallSyntax(Protocol):
    """One way of writing calls."""

    @property
    def begin(self) -> str:
        """The marker at which a block of calls begins."""
        ...

    def read(self, context: CallContext) -> Reading[bool]:
        """Take a block of calls, at whose begin the text stands. False, and nothing is taken, if it is none."""
        ...

    @property
    def style(self) -> str:
        """How arguments are written, by xgrammar's name."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether each call is a block of its own."""
        ...

    def list_tags(self, calls: Sequence[tuple[str, TagPart]], is_parallel: bool) -> list[TagPart]:
        """Blocks, each as a tag of xgrammar that begins with `begin`. `calls`: names of tools, and their arguments."""
        ...


class TaggedCalls:
    """GLM-4.5 to GLM-5.x: <tool_call>name, then <arg_key>key</arg_key><arg_value>value</arg_value> for each argument,
    with or without line breaks between, then </tool_call>."""

    begin, end = "<tool_call>", "</tool_call>"
    key, key_end, value, value_end = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
    style, repeats = "glm_xml", True

    def read(self, context: CallContext) -> Reading[bool]:
        incoming = context.incoming
        name_end = yield from find_name_end(incoming, len(self.begin), (self.key, self.end))
        if name_end is None:
            return False
        name, found = incoming.text[len(self.begin) : name_end].strip(), dict[str, str]()
        place, mark = yield from incoming.find(self.key, self.end, start=name_end)
        while mark == self.key:
            key_end, mark = yield from incoming.find(self.key_end, self.end, start=place)
            start = key_end
            if mark == self.key_end:
                start, mark = yield from incoming.find(self.value, self.end, start=key_end)
            if mark != self.value:  # a key without a value, up to the end of the call or of the text
                context.tell_unparsed(incoming.take(start + len(mark) if mark else len(incoming.text)))
                return True
            key = incoming.text[place + len(self.key) : key_end].strip()
            start += len(self.value)
            stop = yield from find_value_end(incoming, self.value_end, self.end, start)
            if stop is None:
                place = -1
                break
            raw = strip_value(incoming.text[start:stop], context.tools, name, key)
            found[key] = write_value(raw, find_types(context.tools, name, key), None)
            place, mark = yield from incoming.find(self.key, self.end, start=stop)
        if place < 0:
            context.tell_unparsed(incoming.take(len(incoming.text)))
        else:
            incoming.take(place + len(self.end))
            context.tell_call(name, write_object(found))
        return True

    def list_tags(self, calls: Sequence[tuple[str, TagPart]], is_parallel: bool) -> list[TagPart]:
        return [write_tag(self.begin + name, arguments, self.end) for name, arguments in calls]


@dataclass(frozen=True)
class DsmlCalls:
    """DeepSeek-V3.2: a block of calls, each with one parameter a line, which say whether they are texts."""

    block: str = "function_calls"
    token: str = "｜DSML｜"
    style: str = "deepseek_xml"
    repeats: bool = False

    @property
    def begin(self) -> str:
        return f"<{self.token}{self.block}>"

    def read(self, context: CallContext) -> Reading[bool]:
        incoming, block_end = context.incoming, f"</{self.token}{self.block}>"
        invoke = f"<{self.token}invoke"
        place = yield from incoming.skip_blanks(len(self.begin))
        is_block = yield from incoming.starts_with(invoke, place)
        if not is_block:
            return False
        if place == len(incoming.text):  # cut off before its first call
            context.tell_unparsed(incoming.take(place))
            return True
        incoming.take(place)
        while True:
            is_call = yield from self._read_invoke(context)
            if not is_call:
                return True
            is_more = yield from pass_between(context, invoke, block_end)
            if not is_more:
                return True

    def _read_invoke(self, context: CallContext) -> Reading[bool]:
        """Take one call. False if the text ends within it; then all of it is told as unparsed."""
        incoming, close = context.incoming, f"</{self.token}invoke>"
        parameter, parameter_end = f"<{self.token}parameter", f"</{self.token}parameter>"
        head_end, _ = yield from incoming.find(">")
        name = find_attribute(incoming.text[: max(head_end, 0)], "name")
        found: dict[str, str] = {}
        place = head_end
        if head_end > 0 and incoming.text[head_end - 1] == "/":
            place, mark = head_end + 1, ""
        elif head_end >= 0:
            place, mark = yield from incoming.find(parameter, close, start=head_end)
            while mark == parameter:
                tag_end, _ = yield from incoming.find(">", start=place)
                stop = None if tag_end < 0 else (yield from find_value_end(incoming, parameter_end, close, tag_end + 1))
                if stop is None:
                    place = -1
                    break
                tag, raw = incoming.text[place:tag_end], incoming.text[tag_end + 1 : stop]
                key, is_text = (
                    find_attribute(tag, "name"),
                    {"true": True, "false": False}.get(find_attribute(tag, "string")),
                )
                found[key] = write_value(raw, find_types(context.tools, name, key), is_text)
                place, mark = yield from incoming.find(parameter, close, start=stop)
            place += len(close) if place >= 0 else 0
        if place < 0 or not name:
            context.tell_unparsed(incoming.take(place if place > 0 else len(incoming.text)))
            return place > 0
        incoming.take(place)
        context.tell_call(name, write_object(found))
        return True

    def list_tags(self, calls: Sequence[tuple[str, TagPart]], is_parallel: bool) -> list[TagPart]:
        invoke = f"<{self.token}invoke name="
        tags = [write_tag(f'{invoke}"{name}">\n', arguments, f"</{self.token}invoke>\n") for name, arguments in calls]
        return [write_call_block(f"{self.begin}\n", tags, f"</{self.token}{self.block}>", is_parallel)]


@dataclass(frozen=True)
class FencedCalls:
    """DeepSeek-V3 and V3.1, and so V3.2-Exp: a block of calls whose arguments are JSON. V3 writes "function" before the
    name and a fence of ``` around the arguments: `is_fenced`. Either is read."""

    is_fenced: bool = False
    style: str = "json"
    repeats: bool = False

    begin, block_end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call, call_end, between = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
    fenced = re.compile(r"\s*(\S+)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)

    def read(self, context: CallContext) -> Reading[bool]:
        incoming = context.incoming
        place = yield from incoming.skip_blanks(len(self.begin))
        is_block = yield from incoming.starts_with(self.call, place)
        if not is_block:
            return False
        if place == len(incoming.text):  # cut off before its first call
            context.tell_unparsed(incoming.take(place))
            return True
        incoming.take(place)
        while True:
            yield from self._read_call(context)
            is_more = yield from pass_between(context, self.call, self.block_end)
            if not is_more:
                return True

    def _read_call(self, context: CallContext) -> Reading[None]:
        """Take one call: up to the first end behind which its arguments are JSON."""
        incoming, place, first = context.incoming, 0, -1
        while True:
            place, _ = yield from incoming.find(self.call_end, start=place)
            if place < 0:
                context.tell_unparsed(incoming.take(first if first > 0 else len(incoming.text)))
                return
            body = incoming.text[len(self.call) : place]
            place += len(self.call_end)
            first = place if first < 0 else first
            if read := self._split(body):
                incoming.take(place)
                context.tell_call(*read)
                return

    def _split(self, body: str) -> tuple[str, str] | None:
        """Name and arguments of a call; None while the arguments are no JSON object."""
        name, between, arguments = body.partition(self.between)
        if name.strip() == "function" and (fenced := self.fenced.fullmatch(arguments)):
            name, arguments = fenced[1], fenced[2]
        try:
            is_object = bool(between and name.strip()) and isinstance(read_strictly(arguments), dict)
        except (ValueError, RecursionError):
            return None
        return (name.strip(), arguments.strip()) if is_object else None

    def list_tags(self, calls: Sequence[tuple[str, TagPart]], is_parallel: bool) -> list[TagPart]:
        ends = (f"function{self.between}", "\n```json\n", "\n```") if self.is_fenced else ("", self.between, "")
        before, between, behind = ends
        tags = [
            write_tag(f"{self.call}{before}{name}{between}", arguments, f"{behind}{self.call_end}")
            for name, arguments in calls
        ]
        between_calls = "\n" if self.is_fenced else ""
        return [write_call_block(self.begin, tags, self.block_end, is_parallel, between_calls)]


def pass_between(context: CallContext, begin: str, block_end: str) -> Reading[bool]:
    """Take what stands before the next call of a block, and tell it unless it is white space. False, and its end is
    taken, if the block has no more calls."""
    incoming = context.incoming
    place, mark = yield from incoming.find(begin, block_end)
    if between := incoming.take(place if mark else len(incoming.text)).strip():
        context.tell_unparsed(between)
    if mark == block_end:
        incoming.take(len(mark))
    return mark == begin


def find_name_end(incoming: IncomingText, start: int, marks: Sequence[str]) -> Reading[int | None]:
    """Where the name of a tool ends that begins at `start`; None as soon as what stands there is none. A text that was
    cut before the name counts as one."""
    start = yield from incoming.skip_blanks(start)
    while True:
        match = TOOL_NAME.match(incoming.text, start)
        if match is None:
            return start if incoming.is_cut and start == len(incoming.text) else None
        if match.end() < len(incoming.text) or incoming.is_ended:
            break
        yield
    place = yield from incoming.skip_blanks(match.end())
    for mark in marks:
        is_there = yield from incoming.starts_with(mark, place)
        if is_there or (incoming.is_ended and mark.startswith(incoming.text[place:])):
            return match.end()
    return None


def find_value_end(incoming: IncomingText, close: str, outer: str, start: int) -> Reading[int | None]:
    """Where a value ends: at its own closing marker. Only if the text ends without one, at the marker that closes the
    call around it: models forget the last one. None if the text ends before either."""
    place, _ = yield from incoming.find(close, start=start)
    if place < 0:
        place = incoming.text.find(outer, start)
    return None if place < 0 else place


def find_attribute(tag: str, name: str) -> str:
    found = re.search(rf'\s{name}="(.*?)"(?=[\s/]|$)', tag, re.DOTALL)
    return found[1] if found else ""


def write_object(values: Mapping[str, str]) -> str:
    """An object of values that are JSON already."""
    return "{" + ", ".join(f"{write_json(key)}: {value}" for key, value in values.items()) + "}"


def write_tag(begin: str, content: TagPart, end: str) -> TagPart:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def write_call_block(begin: str, tags: Sequence[TagPart], end: str, is_parallel: bool, between: str = "") -> TagPart:
    """One call or several, and what stands around them."""
    calls = {"type": "tags_with_separator", "tags": list(tags), "separator": between, "at_least_one": True}
    return write_tag(begin, calls | {"stop_after_first": not is_parallel}, end)
