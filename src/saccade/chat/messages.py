"""Messages and tools from clients, checked and in one shape. Knows no format.

What a client may leave out or write in two ways is made plain here, once: content as text, the arguments of calls as
objects, reasoning under one name. RequestError names the message. Next: template.py and deepseek.py, which write them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.base.values import show
from saccade.chat.schema import TOOL_NAME
from saccade.chat.types import ChatOptions, Message, Tool
from saccade.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # the first is the one that formats read
SWITCHES = ("thinking", "enable_thinking")  # of templates: DeepSeek's name, and GLM's


def check_messages(messages: Sequence[Message], continues: bool = False) -> list[dict[str, Any]]:
    """Copies of the messages: `content` is text, `reasoning_content` the reasoning, `arguments` of calls an object.
    Each result has its call, and each call its result, but for those of the last message. `continues`: that goes on."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages: expected a list of objects with role and content, found {show(messages)}")
    if not messages:
        raise RequestError("messages: expected one at least, found an empty list")
    chat = [_check_message(message, f"message {place}") for place, message in enumerate(messages)]
    _check_results(chat)
    if continues and chat[-1]["role"] != "assistant":
        where, found = f"message {len(chat) - 1}", chat[-1]["role"]
        raise RequestError(f"{where}: expected the last message to be the assistant's, to go on, found {found}")
    return chat


def require_question(messages: Sequence[Message], continues: bool) -> None:
    """RequestError unless the last of messages that are right asks for an answer, or begins it: `continues`."""
    last, where = messages[-1], f"message {len(messages) - 1}"
    if last.get("tool_calls"):
        raise RequestError(f"{where}: calls tools; expected a result of each call behind it")
    if last.get("role") == "assistant" and not continues:
        raise RequestError(
            f"{where}: the assistant's, and nothing asks for an answer; expected a question, or `continues`"
        )


def check_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Copies of the tools, each as {"type": "function", "function": {...}}; one that is the function alone as well."""
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools: expected a list of objects, found {show(tools)}")
    found = []
    for place, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(
                f'tool {place}: expected {{"type": "function", "function": {{"name": ...}}}}, found {show(tool)}'
            )
        if not TOOL_NAME.fullmatch(function["name"]):
            what = "a name without blanks, quotes and <>{}, as calls are read"
            raise RequestError(f"tool {place}: expected {what}, found {show(function['name'])}")
        found.append({"type": "function", "function": dict(function)})
    return found


def find_thinking(options: ChatOptions) -> bool | None:
    """The thinking switch under any of its names; an effort of "none" is off. None: nobody says."""
    said = {name: options.variables[name] for name in SWITCHES if options.variables.get(name) is not None}
    if options.thinking is not None:
        said["thinking of the options"] = options.thinking
    for name, value in said.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name}: expected true or false, found {show(value)}")
    if len(set(said.values())) > 1:
        raise RequestError(f"{' and '.join(said)} disagree; expected one of them")
    if said:
        return bool(next(iter(said.values())))
    return False if options.reasoning_effort == "none" else None


def read_arguments(arguments: object, where: str) -> dict[str, Any]:
    """The arguments of a call as an object, from one or from JSON text; none at all are {}."""
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RequestError(f"{where}: expected arguments as a JSON object, found {show(arguments)}") from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: expected arguments as a JSON object, found {show(arguments)}")
    return dict(value)


def join_parts(content: object, where: str) -> str:
    """Content as text: a text, none, or a list of parts that are texts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}: expected content as text or a list of parts, found {show(content)}")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RequestError(f"{where}: expected parts of text, found {show(kind)}; the model reads text alone")
    return "".join(texts)


def _check_results(chat: Sequence[Mapping[str, Any]]) -> None:
    """RequestError for a result without a call before it, and for a call without a result behind it."""
    asker, waiting = -1, list[Any]()  # the last message with calls, and the ids of those without results
    for place, message in enumerate(chat):
        if message["role"] == "tool":
            if not waiting:
                raise RequestError(f"message {place}: the result of a tool, and no call before it waits for one")
            asked = message.get("tool_call_id")
            if asked in waiting:
                waiting.remove(asked)
            elif asked is None or None in waiting:
                waiting.pop(0)  # by their order
            else:
                found = f"expected the result of {' or '.join(map(show, waiting))}, found one of {show(asked)}"
                raise RequestError(f"message {place}: {found}")
        else:
            _require_results(asker, waiting)
            asker, waiting = place, [call.get("id") for call in message.get("tool_calls", ())]
    if chat[-1]["role"] == "tool":
        _require_results(asker, waiting)


def _require_results(asker: int, waiting: Sequence[Any]) -> None:
    if waiting:
        text = f"calls tools; expected a result of each call behind it, {len(waiting)} missing"
        raise RequestError(f"message {asker}: {text}")


def _check_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: expected an object with role and content, found {show(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: role: expected one of {', '.join(ROLES)}, found {show(role)}")
    plain = {key: value for key, value in message.items() if value is not None and key not in REASONING_NAMES}
    if role == "user" and message.get("content") is None:
        raise RequestError(f"{where}: content: expected text or a list of parts, found none")
    plain["content"] = join_parts(message.get("content"), where)
    if role == "assistant":
        reasoning = next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)
        if reasoning is not None:
            plain["reasoning_content"] = join_parts(reasoning, f"{where}: reasoning")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"{where}: tool_calls: expected a list, found {show(calls)}")
        plain.pop("tool_calls", None)
        if calls:
            plain["tool_calls"] = [_check_call(call, f"{where}: call {place}") for place, call in enumerate(calls)]
    return plain


def _check_call(call: object, where: str) -> dict[str, Any]:
    """{"type", "id", "function": {"name", "arguments"}}, from that or from the function alone."""
    whole: Mapping[str, Any] = call if isinstance(call, Mapping) else {}
    function = whole.get("function", whole)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f'{where}: expected {{"function": {{"name", "arguments"}}}}, found {show(call)}')
    arguments = read_arguments(function.get("arguments"), where)
    beside = {key: value for key, value in whole.items() if key in ("type", "id")}
    return {"type": "function"} | beside | {"function": {"name": function["name"], "arguments": arguments}}
