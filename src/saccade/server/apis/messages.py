"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, which coding agents use.

`max_tokens` beyond the context is cut to what has room. Next: message_fields.py, what comes in; chats.py.
"""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from saccade.chat.types import CallDelta, ChatDelta, ContentDelta, ReasoningDelta
from saccade.server.apis.message_fields import CountRequest, MessagesRequest
from saccade.server.bodies import WHOLE_OR_EVENTS, JsonRoute, guarded, respond, stream, unless_gone, write_event
from saccade.server.chats import (
    KEPT_TAIL,
    ChatPrompt,
    ChatTurn,
    WholeChat,
    collect_chats,
    read_chat,
    write_chat,
)
from saccade.server.engine.wire import Counts
from saccade.server.refusals import ANTHROPIC, ApiError, shape_error
from saccade.server.service import COUNTED, Service


class MessageWriter:
    """Writes the answer to one request."""

    def __init__(self, service: Service, request: MessagesRequest, prompt: ChatPrompt) -> None:
        self.service, self.request, self.prompt = service, request, prompt
        self.id = f"msg_{uuid.uuid4().hex[:24]}"

    def write_message(self, blocks: Sequence[Any], ending: Any, usage: Any) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.request.model or self.service.name}
        return {**head, "content": list(blocks), **ending, "usage": usage}

    def write_usage(self, tokens: int, counts: Counts) -> dict[str, Any]:
        cached = min(counts.cached, len(self.prompt.tokens))
        return {
            "input_tokens": len(self.prompt.tokens) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": tokens,
        }

    def write_ending(self, reason: str | None, has_calls: bool, tail: Sequence[int]) -> dict[str, Any]:
        """Why the answer ended. `tail`: its last tokens, in which a stop sequence may lie."""
        sequence = None
        if reason == "stop" and self.request.stop_sequences:
            sequence = self._find_sequence(tail, self.request.stop_sequences)
        names = {"length": "max_tokens", "stop": "tool_use" if has_calls else "end_turn"}
        told = "stop_sequence" if sequence is not None else names.get(reason or "", "end_turn")
        return {"stop_reason": told, "stop_sequence": sequence}

    def _find_sequence(self, tail: Sequence[int], sequences: Sequence[str]) -> str | None:
        if tail and tail[-1] in self.service.engine.ready.eos_token_ids:
            return None
        text = b"".join(self.service.spell(token) for token in tail).decode(errors="replace")
        found = [(text.find(sequence), sequence) for sequence in sequences if sequence in text]
        return min(found)[1] if found else sequences[0] if len(sequences) == 1 else None


def route_messages(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post(ANTHROPIC, responses=WHOLE_OR_EVENTS)
    async def answer_messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        question, fields = body.read_question(body.max_tokens), body.read_sampling()
        prompt = await write_chat(service, question)
        limit = min(body.max_tokens, service.find_room(len(prompt.tokens)))
        kept = {"skip_special_tokens": False, "stops": service.find_chat_stops()}
        params = fields.make_params(limit, None, prompt.constraint, prompt.names, **kept)
        writer = MessageWriter(service, body, prompt)

        async def begin() -> AsyncIterator[tuple[int, ChatTurn]]:
            deltas = await service.submit([(prompt.tokens, params[0])], names=prompt.names)
            return read_chat(service, prompt, deltas, 1)

        async def answer() -> Response:
            (chat,) = await collect_chats(await begin(), 1)
            ending = writer.write_ending(chat.finish_reason, bool(chat.calls), chat.tail)
            usage = writer.write_usage(chat.tokens, chat.counts)
            return respond(writer.write_message(write_blocks(chat, body.hides_thinking), ending, usage))

        if not body.stream:
            return await unless_gone(request, answer())
        return stream(guarded(write_message_events(writer, await begin()), write=write_message_error))

    @router.post(f"{ANTHROPIC}/count_tokens")
    async def count_tokens(body: CountRequest) -> Response:
        """How many tokens a conversation has as a prompt."""
        service.check_model(body.model)
        prompt = await write_chat(service, body.read_question(), COUNTED)
        return respond({"input_tokens": len(prompt.tokens)})

    return router


def write_blocks(chat: WholeChat, hides_thinking: bool) -> list[dict[str, Any]]:
    blocks = list[dict[str, Any]]()
    if chat.reasoning:
        blocks.append({"type": "thinking", "thinking": "" if hides_thinking else chat.reasoning, "signature": ""})
    if chat.content:
        blocks.append({"type": "text", "text": chat.content})
    for call in chat.calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
    return blocks


async def write_message_events(writer: MessageWriter, turns: AsyncIterator[tuple[int, ChatTurn]]) -> AsyncIterator[str]:
    blocks, tokens, tail, has_calls = BlockEvents(writer.request.hides_thinking), 0, list[int](), False
    start = writer.write_message([], {"stop_reason": None, "stop_sequence": None}, writer.write_usage(0, Counts()))
    try:
        yield write_named({"type": "message_start", "message": start})
        async for _, turn in turns:
            tokens += len(turn.delta.tokens)
            tail = [*tail, *turn.delta.tokens][-KEPT_TAIL:]
            for said in turn.said:
                has_calls = has_calls or isinstance(said, CallDelta)
                for event in blocks.take(said):
                    yield write_named(event)
            if turn.delta.is_last:
                for event in blocks.close():
                    yield write_named(event)
                ending = writer.write_ending(turn.delta.finish_reason, has_calls, tail)
                usage = writer.write_usage(tokens, turn.delta.counts)
                yield write_named({"type": "message_delta", "delta": ending, "usage": usage})
        yield write_named({"type": "message_stop"})
    finally:
        await turns.aclose()  # type: ignore[attr-defined]


class BlockEvents:
    """Events of the blocks of one message: each begins, grows and ends before the next."""

    def __init__(self, hides_thinking: bool) -> None:
        self._index, self._kind, self._hides_thinking = -1, "", hides_thinking

    def take(self, said: ChatDelta) -> list[dict[str, Any]]:
        if isinstance(said, ContentDelta):
            delta = {"type": "text_delta", "text": said.text}
            return [*self._open("text", {"type": "text", "text": ""}), self._grow(delta)]
        if isinstance(said, ReasoningDelta):
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            grown = [] if self._hides_thinking else [self._grow({"type": "thinking_delta", "thinking": said.text})]
            return [*self._open("thinking", empty), *grown]
        if isinstance(said, CallDelta):
            block: dict[str, Any] = {"type": "tool_use", "id": said.id, "name": said.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": said.arguments}
            return [*self.close(), *self._open("tool_use", block), self._grow(delta), *self.close()]
        return []  # what began as a call and is none has no place in this API

    def close(self) -> list[dict[str, Any]]:
        if not self._kind:
            return []
        ends = [self._grow({"type": "signature_delta", "signature": ""})] if self._kind == "thinking" else []
        self._kind = ""
        return [*ends, {"type": "content_block_stop", "index": self._index}]

    def _open(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        if kind == self._kind:
            return []
        ends = self.close()
        self._index, self._kind = self._index + 1, kind
        return [*ends, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _grow(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def write_named(event: dict[str, Any]) -> str:
    return write_event(event, event["type"])


def write_message_error(error: ApiError) -> str:
    return write_named(shape_error(ANTHROPIC, error.status_code, error.message))
