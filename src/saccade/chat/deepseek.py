"""The chats of DeepSeek-V3.2, which ships no template but an encoding: `encoding_dsv32` in its repository.

Written from what is published of it, and held to the published pairs of input and output. Next: calls.py, which reads
the calls that are written here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.base.values import show
from saccade.chat.messages import SWITCHES, check_messages, check_tools, find_thinking
from saccade.chat.parser import AnswerParser
from saccade.chat.syntax import DEEPSEEK_V32, THINK, THINK_END
from saccade.chat.types import ChatOptions, Message, Tool
from saccade.errors import RequestError

BEGIN, TURN_END, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CALLS = "<｜DSML｜function_calls>\n{}\n</｜DSML｜function_calls>"
INVOKE = '<｜DSML｜invoke name="{}">\n{}\n</｜DSML｜invoke>'
PARAMETER = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>'

# The wording is part of the format: the model was trained with it, to the letter.
TOOLS = """## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{}
</functions>
"""  # noqa: E501
SCHEMA = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{}"
RESULTS, RESULTS_END = "\n\n<function_results>", "\n</function_results>"


class DeepSeekFormat:
    """The ChatFormat of DeepSeek-V3.2. It does not think unless asked to."""

    name = "DeepSeek-V3.2"
    stops: tuple[str, ...] = ()
    syntax = DEEPSEEK_V32

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: ChatOptions = ChatOptions()
    ) -> str:
        """As ChatFormat says. Reasoning before the last user's message is left out. A developer's message that brings
        tools of its own is written as the encoding has it, for search agents; any other is a system message."""
        chat = place_tools(check_messages(messages, options.continues), check_tools(tools), options.response_schema)
        chat = order_results(chat)
        is_thinking = choose_thinking(options)
        last = find_last_user(chat)
        written = [self._write(chat, place, last, is_thinking) for place in range(len(chat))]
        if options.continues:
            written[-1] = written[-1].removesuffix(TURN_END)
        elif chat[-1]["role"] == "system":  # the encoding opens an answer behind users and results alone
            written.append(ASSISTANT + (THINK if is_thinking else THINK_END))
        return BEGIN + "".join(written)

    def new_parser(self, prompt: str, tools: Sequence[Tool] = ()) -> AnswerParser:
        return AnswerParser(DEEPSEEK_V32, prompt, check_tools(tools))

    def _write(self, chat: Sequence[Mapping[str, Any]], place: int, last: int, is_thinking: bool) -> str:
        message = chat[place]
        role, content = message["role"], message["content"]
        opens = THINK if is_thinking and place >= last else THINK_END  # behind a user or results: does it think now?
        if role == "system":
            return content + "".join(f"\n\n{part}" for part in write_extras(message))
        if role == "user":
            return USER + content + ASSISTANT + opens
        if role == "developer":
            extras = "".join(f"\n\n{part}" for part in write_extras(message))
            return f"{USER}{extras}\n\n# The user's message is: {content}{ASSISTANT}{opens}"
        if role == "tool":
            first, count = find_call(chat, place)
            begin = RESULTS if place == first else ""
            end = f"{RESULTS_END}\n\n{opens}" if place == first + count - 1 else ""
            return f"{begin}\n<result>{content}</result>{end}"
        reasoning = message.get("reasoning_content", "") + THINK_END if is_thinking and place > last else ""
        calls = message.get("tool_calls")
        return reasoning + content + (write_calls(calls) if calls else "") + TURN_END


def choose_thinking(options: ChatOptions) -> bool:
    """Asked for, or by an effort: there is one way to think. RequestError for variables, since there is no template."""
    for name, value in options.variables.items():
        if name not in SWITCHES and value is not None:
            raise RequestError(f"chat_template_kwargs: the format of DeepSeek-V3.2 has no variable {show(name)}")
    asked = find_thinking(options)
    if asked is not None:
        return asked
    return options.reasoning_effort is not None if options.thinks_unasked is None else options.thinks_unasked


def place_tools(
    chat: list[dict[str, Any]], tools: list[dict[str, Any]], schema: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The messages with tools and schema in the system message at their head, which is made if there is none."""
    chat = [
        message | {"role": "system"} if message["role"] == "developer" and not write_extras(message) else message
        for message in chat
    ]
    if not tools and schema is None:
        return chat
    if chat[0]["role"] != "system":
        chat = [{"role": "system", "content": ""}, *chat]
    head = dict(chat[0])
    if tools:
        head["tools"] = [*check_tools(head.get("tools")), *tools]
    if schema is not None:
        head["response_format"] = schema
    return [head, *chat[1:]]


def write_extras(message: Mapping[str, Any]) -> list[str]:
    """What a message says about tools, and about the schema of the answer."""
    parts = []
    if tools := check_tools(message.get("tools")):
        parts.append(TOOLS.format("\n".join(to_text(tool["function"]) for tool in tools)))
    if message.get("response_format"):
        parts.append(SCHEMA.format(to_text(message["response_format"])))
    return parts


def find_last_user(chat: Sequence[Mapping[str, Any]]) -> int:
    return max((place for place, message in enumerate(chat) if message["role"] in ("user", "developer")), default=-1)


def find_call(chat: Sequence[Mapping[str, Any]], place: int) -> tuple[int, int]:
    """Of the results that the one at `place` stands among: the first one's place, and how many belong together."""
    first = place
    while first > 0 and chat[first - 1]["role"] == "tool":
        first -= 1
    results = next((n for n, message in enumerate(chat[first:]) if message["role"] != "tool"), len(chat) - first)
    return first, results


def order_results(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results in the order of their calls, where ids name those: the encoding tells them apart by order alone."""
    ordered: list[dict[str, Any]] = []
    for place, message in enumerate(chat):
        if message["role"] == "tool" and ordered and ordered[-1]["role"] != "tool":
            count = next((n for n, other in enumerate(chat[place:]) if other["role"] != "tool"), len(chat) - place)
            run = chat[place : place + count]
            ids = {call.get("id"): n for n, call in enumerate(ordered[-1].get("tool_calls", ()))}
            if len({result.get("tool_call_id") for result in run} & ids.keys()) == len(run):
                run = sorted(run, key=lambda result: ids[result["tool_call_id"]])
            ordered += run
        elif message["role"] != "tool" or not ordered:
            ordered.append(message)
    return ordered


def write_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """A block of calls, as the model writes it."""
    written = []
    for call in calls:
        function = call["function"]
        lines = [
            PARAMETER.format(key, *(("true", value) if isinstance(value, str) else ("false", to_text(value))))
            for key, value in function["arguments"].items()
        ]
        written.append(INVOKE.format(function["name"], "\n".join(lines)))
    return "\n\n" + CALLS.format("\n".join(written))


def to_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
