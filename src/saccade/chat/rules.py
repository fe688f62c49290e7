"""What an answer must match: calls that must come or must keep a schema, content that must match, reasoning before.

All of it is one grammar, a structural tag of xgrammar, because only the model's syntax says where reasoning ends and
how calls are written. Next: calls.py, how calls are written; engine/sampling/grammar.py, which compiles the tag.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.base.values import show
from saccade.chat.calls import TagPart, write_tag
from saccade.chat.messages import check_tools
from saccade.chat.syntax import THINK, THINK_END, Syntax
from saccade.chat.types import ChatOptions, Tool
from saccade.errors import RequestError
from saccade.text.enforceable import OR_ELSE, find_unenforced

CHOICES = ("auto", "none", "required")
BREAKS: TagPart = {"type": "regex", "pattern": "\\n{0,2}"}  # as models write them before a call, or behind reasoning
ANY_TEXT: TagPart = {"type": "any_text"}
ANY_OBJECT = {"type": "object", "additionalProperties": True}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def constrain_answer(
    syntax: Syntax, prompt: str, tools: Sequence[Tool], options: ChatOptions, constraint: tuple[str, Any] | None = None
) -> dict[str, Any]:
    """The field of SamplingParams that the answer to `prompt` must match; {} if it is free. `constraint`: such a field
    already, for the content alone. RequestError for what no grammar can keep."""
    called = choose_tools(tools, options)
    is_required = options.tool_choice == "required"
    is_bound = bool(called) and (
        is_required
        or not options.parallel_tool_calls
        or len(called) < len(tools)
        or any(tool["function"].get("strict") for tool in called)
    )
    if is_bound and syntax.calls is None:
        if is_required or len(called) < len(tools):
            raise RequestError("tool_choice: this model's chat format has no calls of tools that could be required")
        is_bound = False  # no call will come, so none breaks a rule
    content = None if constraint is None else write_content(*constraint)
    reasoning = write_reasoning(syntax, prompt, options.reasoning_limit)
    if not is_bound and content is None and (options.reasoning_limit is None or not reasoning):
        return {}
    if is_required:
        answer = write_required_calls(syntax, called, options.parallel_tool_calls)
    elif called and syntax.calls is not None:
        answer = write_free_calls(syntax, called, options.parallel_tool_calls, content)
    else:
        answer = content or ANY_TEXT
    if not reasoning and answer is content and constraint is not None:
        return dict([constraint])
    breaks = [BREAKS] if syntax.drops_breaks and answer is content else []
    parts = [*reasoning, *breaks, answer]
    form = parts[0] if len(parts) == 1 else {"type": "sequence", "elements": parts}
    return {"structural_tag": {"type": "structural_tag", "format": form}}


def choose_tools(tools: Sequence[Tool], options: ChatOptions) -> list[dict[str, Any]]:
    """The tools that may be called. RequestError for a choice that cannot be made."""
    if options.tool_choice not in CHOICES:
        raise RequestError(f"tool_choice: expected one of {', '.join(CHOICES)}, found {show(options.tool_choice)}")
    if options.tool_choice == "none":
        return []
    known = check_tools(tools)
    names = [tool["function"]["name"] for tool in known]
    for name in options.allowed_tools or ():
        if name not in names:
            raise RequestError(f"tool_choice: there is no tool {show(name)} in tools")
    if options.tool_choice == "required" and not known:
        raise RequestError("tool_choice: a call that must come needs tools")
    return [tool for tool, name in zip(known, names, strict=True) if name in (options.allowed_tools or names)]


def write_content(name: str, value: Any) -> TagPart:
    """A field of SamplingParams as a format."""
    if name == "json_schema":
        return {"type": "json_schema", "json_schema": json.loads(value) if isinstance(value, str) else dict(value)}
    if name == "structural_tag":
        tag = json.loads(value) if isinstance(value, str) else value
        form: TagPart = tag.get("format", tag)
        return form
    return {"type": name, "pattern" if name == "regex" else "grammar": value}


def write_reasoning(syntax: Syntax, prompt: str, limit: int | None) -> list[TagPart]:
    """What comes before the answer: reasoning that the prompt opens, or that the model may open, of `limit` tokens."""
    text = ANY_TEXT if limit is None else ANY_TEXT | {"max_tokens": limit}
    if syntax.is_reasoning_open(prompt):
        return [write_tag("", text, THINK_END)]
    if syntax.may_open_reasoning(prompt):
        opened = {"type": "sequence", "elements": [BREAKS, write_tag(THINK, text, THINK_END)]}
        return [{"type": "optional", "content": opened}]
    return []


def write_required_calls(syntax: Syntax, tools: Sequence[Tool], is_parallel: bool) -> TagPart:
    """Calls and nothing else, one at least."""
    calls = list_calls(syntax, tools, is_parallel)
    block = {
        "type": "sequence",
        "elements": [BREAKS, calls[0] if len(calls) == 1 else {"type": "or", "elements": calls}],
    }
    repeats = syntax.calls is not None and syntax.calls.repeats
    return {"type": "plus", "content": block} if is_parallel and repeats else block


def write_free_calls(syntax: Syntax, tools: Sequence[Tool], is_parallel: bool, content: TagPart | None) -> TagPart:
    """Content in which calls may come. Content that must match something has either: all of it, or calls alone."""
    if content is not None:
        return {"type": "or", "elements": [content, write_required_calls(syntax, tools, is_parallel)]}
    begin = syntax.calls.begin if syntax.calls else ""
    tags = list_calls(syntax, tools, is_parallel)
    return {"type": "triggered_tags", "triggers": [begin], "tags": tags, "stop_after_first": not is_parallel}


def list_calls(syntax: Syntax, tools: Sequence[Tool], is_parallel: bool) -> list[TagPart]:
    if syntax.calls is None:
        return []
    calls = [(tool["function"]["name"], write_arguments(tool["function"], syntax.calls.style)) for tool in tools]
    return syntax.calls.list_tags(calls, is_parallel)


def write_arguments(function: Mapping[str, Any], style: str) -> TagPart:
    """The arguments of a tool; none, if it names none. A schema that is strict must be kept. Any other one is, if that
    can be; if it cannot, or if "strict" is false, arguments are free."""
    schema, strict = function.get("parameters"), function.get("strict")
    free: TagPart = {"type": "json_schema", "json_schema": ANY_OBJECT if style == "json" else True, "style": style}
    if schema is None:
        return free | {"json_schema": NO_ARGUMENTS}
    if not strict and (strict is False or not schema):
        return free
    problem = find_unenforced(schema)
    if strict and problem:
        raise RequestError(f"tools: {function['name']} is strict, and its parameters, {problem}")
    kept = free | {"json_schema": schema}
    if strict:
        return kept
    return free if problem else kept | {OR_ELSE: free["json_schema"]}
