"""POST /v1/chat/completions: messages, tools, reasoning, as OpenAI's clients and those of other engines ask.

Next: chats.py, which renders and parses; completions.py, the same without messages.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from saccade.chat.types import CallDelta, ChatDelta, ChatOptions, ContentDelta, ReasoningDelta
from saccade.server.apis.constraints import find_constraint
from saccade.server.apis.sampling import MOST_LOGPROBS, SamplingFields, refuse_field
from saccade.server.apis.types import ApiModel, WholeNumber, YesNo
from saccade.server.apis.usage import count_usage
from saccade.server.bodies import WHOLE_OR_EVENTS, JsonRoute, guarded, respond, stream, unless_gone, write_event
from saccade.server.chats import (
    ChatPrompt,
    ChatQuestion,
    ChatTurn,
    WholeChat,
    choose_thinking,
    collect_chats,
    read_chat,
    write_chat,
)
from saccade.server.service import Service
from saccade.server.wire import Counts, Looked, TokenRow


class ThinkingSwitch(ApiModel):
    """As the APIs of DeepSeek and GLM have it."""

    type: Literal["enabled", "disabled", "adaptive"]


class ChosenFunction(ApiModel):
    name: str


class ChosenTool(ApiModel):
    type: Literal["function"] = "function"
    function: ChosenFunction


class ChatRequest(SamplingFields):
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChosenTool | None = None
    max_tokens: WholeNumber | None = Field(None, ge=1)
    max_completion_tokens: WholeNumber | None = Field(None, ge=1)
    logprobs: YesNo | None = None
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=MOST_LOGPROBS)
    thinking: YesNo | ThinkingSwitch | None = None
    enable_thinking: YesNo | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: YesNo = False

    def read_question(self) -> ChatQuestion:
        schema = self.response_format.json_schema if self.response_format else None
        thinking, variables = self._find_thinking(), self._find_variables()
        if find_constraint(self):
            thinking = choose_thinking(thinking, variables)
        options = ChatOptions(
            thinking=thinking,
            reasoning_effort=self.reasoning_effort,
            response_schema=schema.schema_ if schema else None,
            continues=self.continue_final_message,
            variables=variables,
        )
        choice = self.tool_choice or "auto"
        name = choice.function.name if isinstance(choice, ChosenTool) else choice
        return ChatQuestion(self.messages, self.tools or (), name, options)

    def _find_thinking(self) -> bool | None:
        if isinstance(self.thinking, ThinkingSwitch):
            return {"enabled": True, "disabled": False}.get(self.thinking.type)
        return self.thinking

    def _find_variables(self) -> dict[str, Any]:
        variables = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            variables.setdefault("enable_thinking", self.enable_thinking)
        return variables

    def count_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise refuse_field("top_logprobs", "allowed with logprobs=true only")
            return None
        return self.top_logprobs or 0


class ChatWriter:
    """Writes the answers to one request."""

    def __init__(self, service: Service, request: ChatRequest, prompt: ChatPrompt) -> None:
        self.service, self.request, self.prompt = service, request, prompt
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def write_head(self, kind: str) -> dict[str, Any]:
        name = self.request.model or self.service.name
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def write_whole(self, chats: Sequence[WholeChat]) -> dict[str, Any]:
        choices = []
        for place, chat in enumerate(chats):
            message: dict[str, Any] = {
                "role": "assistant",
                "content": chat.content or None if chat.calls else chat.content,
            }
            message["refusal"] = None
            if chat.reasoning:
                message["reasoning_content"] = chat.reasoning
            if chat.calls:
                message["tool_calls"] = [write_call(call) for call in chat.calls]
            if chat.unparsed:
                message["unparsed"] = chat.unparsed
            choices.append(
                {
                    "index": place,
                    "message": message,
                    "logprobs": self.write_logprobs(chat.logprobs),
                    "finish_reason": find_reason(chat.finish_reason, bool(chat.calls)),
                    **self.write_look(chat.looked),
                }
            )
        counts, tokens = [chat.counts for chat in chats], sum(chat.tokens for chat in chats)
        reasoning = sum(chat.reasoning_tokens for chat in chats)
        usage = self.write_usage(tokens, counts, reasoning)
        return {**self.write_head("chat.completion"), "choices": choices, "usage": usage}

    def write_look(self, looked: Looked | None) -> dict[str, Any]:
        return {} if looked is None else {"saccade": self.service.show_look(self.prompt.tokens, looked)}

    def write_usage(self, tokens: int, counts: Sequence[Counts], reasoning: int) -> dict[str, Any]:
        return count_usage(len(self.prompt.tokens), tokens, counts, reasoning)

    def write_logprobs(self, rows: Sequence[TokenRow]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {"content": [self._write_row(*row) for row in rows], "refusal": None}

    def _write_row(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        return self._write_token(token, logprob) | {"top_logprobs": [self._write_token(*each) for each in top]}

    def _write_token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.service.spell(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def route_chat(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", responses=WHOLE_OR_EVENTS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        service.check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise refuse_field("stream_options", "allowed with stream=true only")
        question = body.read_question()
        prompt = await write_chat(service, question)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        params = body.make_params(
            limit, body.count_logprobs(), skip_special_tokens=False, stops=service.find_chat_stops()
        )
        writer = ChatWriter(service, body, prompt)
        ready = service.engine.ready
        capture = body.wants_look(ready.config, limit or ready.max_length)

        async def begin() -> AsyncIterator[tuple[int, ChatTurn]]:
            deltas = await service.submit([(prompt.tokens, each) for each in params], capture)
            return read_chat(service, prompt, deltas, len(params))

        async def answer() -> Response:
            return respond(writer.write_whole(await collect_chats(await begin(), len(params))))

        if not body.stream:
            return await unless_gone(request, answer())
        return stream(guarded(write_chunks(writer, await begin()), "data: [DONE]\n\n"))

    return router


async def write_chunks(writer: ChatWriter, turns: AsyncIterator[tuple[int, ChatTurn]]) -> AsyncIterator[str]:
    tokens, counts, reasoning = 0, list[Counts](), dict[int, int]()
    held: dict[int, list[TokenRow]] = {}  # log-probabilities of text that the parser holds back
    seen, called = set[int](), set[int]()

    def write(place: int, delta: dict[str, Any], reason: str | None = None, looked: Looked | None = None) -> str:
        rows = held.pop(place, [])
        choice = {"index": place, "delta": delta, "logprobs": writer.write_logprobs(rows) if rows else None}
        choice |= {"finish_reason": reason, **writer.write_look(looked)}
        return write_event({**writer.write_head("chat.completion.chunk"), "choices": [choice]})

    try:
        async for place, turn in turns:
            if place not in seen:
                seen.add(place)
                yield write(place, {"role": "assistant", "content": ""})
            tokens += len(turn.delta.tokens)
            reasoning[place] = turn.reasoning_tokens
            held.setdefault(place, []).extend(turn.delta.logprobs or [])
            for each in turn.said:
                if isinstance(each, CallDelta):
                    called.add(place)
                yield write(place, write_delta(each))
            if turn.delta.is_last:
                counts.append(turn.delta.counts)
                yield write(place, {}, find_reason(turn.delta.finish_reason, place in called), turn.delta.looked)
        if writer.request.wants_usage:
            usage = writer.write_usage(tokens, counts, sum(reasoning.values()))
            yield write_event({**writer.write_head("chat.completion.chunk"), "choices": [], "usage": usage})
    finally:
        await turns.aclose()  # type: ignore[attr-defined]


def write_delta(said: ChatDelta) -> dict[str, Any]:
    if isinstance(said, ContentDelta):
        return {"content": said.text}
    if isinstance(said, ReasoningDelta):
        return {"reasoning_content": said.text}
    if isinstance(said, CallDelta):
        return {"tool_calls": [{"index": said.index, **write_call(said)}]}
    return {"unparsed": said.text}


def write_call(call: CallDelta) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def find_reason(reason: str | None, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and reason == "stop" else reason
