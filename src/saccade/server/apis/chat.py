"""POST /v1/chat/completions: messages, tools, reasoning, as OpenAI's clients and those of other engines ask.

Next: chat_fields.py, what comes in; chats.py, which renders and parses; completions.py, the same without messages.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from saccade.chat.types import CallDelta, ChatDelta, ContentDelta, ReasoningDelta
from saccade.server.apis.chat_fields import ChatRequest
from saccade.server.apis.usage import count_usage, write_prompt_logprobs
from saccade.server.bodies import WHOLE_OR_EVENTS, JsonRoute, guarded, respond, stream, unless_gone, write_event
from saccade.server.chats import ChatPrompt, ChatTurn, WholeChat, collect_chats, read_chat, write_chat
from saccade.server.engine.wire import Counts, Looked, TokenRow
from saccade.server.service import Service


class ChatWriter:
    """Writes the answers to one request."""

    def __init__(self, service: Service, request: ChatRequest, prompt: ChatPrompt) -> None:
        self.service, self.request, self.prompt = service, request, prompt
        self.id, self.created = f"chatcmpl-{request.request_id or uuid.uuid4().hex}", int(time.time())

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
                    **self.write_tokens(chat.token_ids),
                    **self.write_look(chat.looked),
                }
            )
        counts, tokens = [chat.counts for chat in chats], sum(chat.tokens for chat in chats)
        reasoning = sum(chat.reasoning_tokens for chat in chats)
        usage = self.write_usage(tokens, counts, reasoning)
        answer = {**self.write_head("chat.completion"), "choices": choices, "usage": usage}
        most = self.request.prompt_logprobs
        if most is not None:
            answer["prompt_logprobs"] = write_prompt_logprobs(self.service, chats[0].prompt_logprobs or [], most)
        return answer | self.write_prompt_tokens()

    def write_tokens(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self.request.return_token_ids else {}

    def write_prompt_tokens(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt.tokens} if self.request.return_token_ids else {}

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
        name = f"token_id:{token}" if self.request.return_tokens_as_token_ids else raw.decode(errors="replace")
        return {"token": name, "logprob": logprob, "bytes": list(raw)}


def route_chat(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", responses=WHOLE_OR_EVENTS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        service.check_model(body.model)
        body.check_stream()
        question, limit = body.read_question(), body.most_tokens
        prompt = await write_chat(service, question)
        kept = {"skip_special_tokens": False, "stops": service.find_chat_stops()}
        params = body.make_params(limit, body.count_logprobs(), prompt.constraint, prompt.names, **kept)
        writer = ChatWriter(service, body, prompt)
        ready = service.engine.ready
        capture = body.wants_look(ready.config, limit or ready.max_length)

        async def begin() -> AsyncIterator[tuple[int, ChatTurn]]:
            deltas = await service.submit([(prompt.tokens, each) for each in params], capture, prompt.names)
            return read_chat(service, prompt, deltas, len(params))

        async def answer() -> Response:
            return respond(writer.write_whole(await collect_chats(await begin(), len(params))))

        if not body.stream:
            return await unless_gone(request, answer())
        return stream(guarded(write_chunks(writer, await begin()), "data: [DONE]\n\n"))

    return router


async def write_chunks(writer: ChatWriter, turns: AsyncIterator[tuple[int, ChatTurn]]) -> AsyncIterator[str]:
    tokens, counts, reasoning = 0, list[Counts](), dict[int, int]()
    rows: dict[int, list[TokenRow]] = {}  # log-probabilities of text that the parser keeps back
    ids: dict[int, list[int]] = {}  # its tokens
    seen, called = set[int](), set[int]()

    def write(place: int, delta: dict[str, Any], reason: str | None = None, looked: Looked | None = None) -> str:
        told = rows.pop(place, [])
        choice = {"index": place, "delta": delta, "logprobs": writer.write_logprobs(told) if told else None}
        choice |= {"finish_reason": reason, **writer.write_tokens(ids.pop(place, [])), **writer.write_look(looked)}
        prompt = writer.write_prompt_tokens() if not seen else {}
        seen.add(place)
        return write_event({**writer.write_head("chat.completion.chunk"), "choices": [choice], **prompt})

    try:
        async for place, turn in turns:
            if place not in seen:
                yield write(place, {"role": "assistant", "content": ""})
            tokens += len(turn.delta.tokens)
            reasoning[place] = turn.reasoning_tokens
            rows.setdefault(place, []).extend(turn.delta.logprobs or [])
            ids.setdefault(place, []).extend(turn.delta.tokens)
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
