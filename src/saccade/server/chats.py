"""Chats, whatever API they come by: messages become a prompt, and deltas of text become reasoning, content and calls.

Knows no API's fields. Next: chat/types.py, what a format of chats does; apis/chat.py, messages.py and responses.py,
which ask.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from saccade.chat.answer import ChatAnswer
from saccade.chat.messages import require_question
from saccade.chat.rules import constrain_answer
from saccade.chat.types import ChatDelta, ChatFormat, ChatOptions, ContentDelta, ReasoningDelta
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError
from saccade.server.engine.wire import Counts, Delta, Looked, TokenRow
from saccade.server.refusals import ApiError, blame_field, blame_request
from saccade.server.service import Service
from saccade.text.enforceable import find_problem

NUMBERED = re.compile(r"(message|tool) (\d+)(?=: )")  # at the begin of a format's errors
KEPT_TAIL = 64  # tokens at the end of an answer in which a stop sequence is looked for
Tools = Sequence[Mapping[str, Any]]


class Constraint(NamedTuple):
    """A field of SamplingParams that an answer must match, its value, and the field of the request that asks for it."""

    name: str
    value: Any
    field: str

    def check(self) -> None:
        """ApiError, naming the request's field, for a value that makes no sense."""
        try:
            named, text = SamplingParams(**{self.name: self.value}).constraint or ("", "")
        except RequestError as error:
            raise blame_field(str(error), {self.name: self.field}) from None
        if problem := find_problem(named, text):
            raise ApiError(400, f"{self.field}: {problem}", self.field)


@dataclass(frozen=True)
class ChatQuestion:
    """What a client asks, in the shape of OpenAI's messages and tools. `constraint`: what the content must match.
    For errors, `places`: where in the request each message stands; (): the n-th is messages.n. `names`: what the
    request calls fields of ChatOptions and SamplingParams, and the "prompt" as a whole."""

    messages: Sequence[Mapping[str, Any]]
    tools: Tools = ()
    options: ChatOptions = field(default_factory=ChatOptions)
    constraint: Constraint | None = None
    places: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def name_fault(self, error: RequestError) -> ApiError:
        """The error of a chat format, about a message or a tool, as one about a field of the request."""
        text = str(error)
        found = NUMBERED.match(text)
        if found is None:
            return blame_request(error, self.names)
        name, place = f"{found[1]}s.{found[2]}", int(found[2])
        if found[1] == "message" and self.places:
            name = self.places[min(place, len(self.places) - 1)]
        return ApiError(400, f"{name}{text[found.end() :]}", name)


class ChatPrompt(NamedTuple):
    """A question as the model reads it."""

    text: str
    tokens: list[int]
    tools: Tools  # that may be called
    constraint: dict[str, Any]  # the field of SamplingParams that the answer must match
    names: Mapping[str, str]  # what the request calls that field, and others


class ChatTurn(NamedTuple):
    """What one Delta of an answer says."""

    said: list[ChatDelta]
    delta: Delta
    reasoning_tokens: int  # of the answer so far


async def write_chat(service: Service, question: ChatQuestion, contexts: int = 1) -> ChatPrompt:
    """The prompt of a question, of up to so many `contexts`. ApiError for what the model's format cannot write."""
    try:
        return await asyncio.to_thread(render, service, require_format(service), question, contexts)
    except RequestError as error:
        raise question.name_fault(error) from None


def render(service: Service, form: ChatFormat, question: ChatQuestion, contexts: int) -> ChatPrompt:
    """Beside the event loop: a long history takes some 10 ms."""
    options, asked = question.options, question.constraint
    if asked is not None:
        asked.check()
    tools = () if options.tool_choice == "none" else question.tools
    text = form.render(question.messages, tools, options)
    require_question(question.messages, options.continues)
    wanted = None if asked is None else (asked.name, asked.value)
    constraint = constrain_answer(form.syntax, text, tools, options, wanted)
    names = {**question.names, **dict.fromkeys(constraint, "tools" if asked is None else asked.field)}
    return ChatPrompt(text, service.encode(text, True, contexts), tools, constraint, names)


def require_one(options: ChatOptions, name: str) -> ChatOptions:
    """One call, of one certain tool."""
    return replace(options, tool_choice="required", allowed_tools=(name,), parallel_tool_calls=False)


def is_answer_begun(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is the assistant's: the begin of the answer, which goes on."""
    return messages[-1].get("role") == "assistant"


def require_format(service: Service) -> ChatFormat:
    if isinstance(service.chat, str):
        raise ApiError(400, f"this model has no chats: {service.chat}", "messages")
    return service.chat


async def read_chat(
    service: Service, prompt: ChatPrompt, deltas: AsyncIterator[tuple[int, Delta]], count: int
) -> AsyncIterator[tuple[int, ChatTurn]]:
    """The turns of `count` answers to `prompt`, by place, as they come."""
    form = require_format(service)
    parsers = [form.new_parser(prompt.text, prompt.tools) for _ in range(count)]
    thought, is_thinking = [0] * count, [True] * count
    try:
        async for place, delta in deltas:
            said = parsers[place].feed(delta.text)
            if delta.is_last:
                said += parsers[place].finish(is_cut=delta.finish_reason == "length")
            if is_thinking[place] and any(not isinstance(each, ReasoningDelta) for each in said):
                is_thinking[place] = False
                thought[place] += len(delta.tokens) if any(isinstance(each, ReasoningDelta) for each in said) else 0
            elif is_thinking[place] and said:
                thought[place] += len(delta.tokens)
            yield place, ChatTurn(merge_said(said), delta, thought[place])
    finally:
        await deltas.aclose()  # type: ignore[attr-defined]


def merge_said(said: Sequence[ChatDelta]) -> list[ChatDelta]:
    """The same with neighbours of content, or of reasoning, as one."""
    found = list[ChatDelta]()
    for each in said:
        before = found[-1] if found else None
        if isinstance(each, ContentDelta) and isinstance(before, ContentDelta):
            found[-1] = ContentDelta(before.text + each.text)
        elif isinstance(each, ReasoningDelta) and isinstance(before, ReasoningDelta):
            found[-1] = ReasoningDelta(before.text + each.text)
        else:
            found.append(each)
    return found


@dataclass
class WholeChat(ChatAnswer):
    """One complete answer of a chat, and how it came."""

    token_ids: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    logprobs: list[TokenRow] = field(default_factory=list)
    prompt_logprobs: list[TokenRow] | None = None
    finish_reason: str | None = None
    counts: Counts = field(default_factory=Counts)
    looked: Looked | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tail(self) -> list[int]:
        """The last tokens."""
        return self.token_ids[-KEPT_TAIL:]

    def take(self, turn: ChatTurn) -> None:
        self.add(turn.said)
        delta = turn.delta
        self.token_ids += delta.tokens
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.logprobs += delta.logprobs or []
        self.reasoning_tokens = turn.reasoning_tokens
        self.finish_reason, self.counts, self.looked = delta.finish_reason, delta.counts, delta.looked


async def collect_chats(turns: AsyncIterator[tuple[int, ChatTurn]], count: int) -> list[WholeChat]:
    chats = [WholeChat() for _ in range(count)]
    async for place, turn in turns:
        chats[place].take(turn)
    return chats
