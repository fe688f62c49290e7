"""POST /v1/responses: OpenAI's newer API, whole and in events. Nothing is kept: every request has its conversation.

Next: response_fields.py, what comes in; chats.py, which answers.
"""

import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from saccade.chat.types import CallDelta, ChatDelta, ContentDelta, ReasoningDelta
from saccade.server.apis.response_fields import ResponsesRequest, TextFormat
from saccade.server.bodies import WHOLE_OR_EVENTS, JsonRoute, guarded, respond, stream, unless_gone, write_event
from saccade.server.chats import ChatPrompt, ChatTurn, WholeChat, read_chat, write_chat
from saccade.server.refusals import ApiError
from saccade.server.service import Service


class ResponseWriter:
    """Builds the response to one request, and the events that tell of it."""

    def __init__(self, service: Service, request: ResponsesRequest, prompt: ChatPrompt) -> None:
        self.service, self.request, self.prompt = service, request, prompt
        self.id, self.created = make_id("resp"), int(time.time())
        self.output: list[dict[str, Any]] = []
        self.chat = WholeChat()
        self._number = -1  # of the last event
        self._kind = ""  # of the item that grows

    def write_response(self, status: str, error: Any = None) -> dict[str, Any]:
        request, chat = self.request, self.chat
        choice, form = request.tool_choice or "auto", request.text.format if request.text else None
        cached = min(chat.counts.cached, len(self.prompt.tokens))
        usage = {
            "input_tokens": len(self.prompt.tokens),
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": chat.tokens,
            "output_tokens_details": {"reasoning_tokens": chat.reasoning_tokens},
            "total_tokens": len(self.prompt.tokens) + chat.tokens,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model or self.service.name,
            "output": self.output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": write_format(form)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [dict.fromkeys(("description", "parameters", "strict")) | tool for tool in request.tools or ()],
            "top_logprobs": 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "user": request.user,
            "usage": usage if status in ("completed", "incomplete") else None,
        }

    def begin(self) -> list[dict[str, Any]]:
        return [
            self._event("response.created", response=self.write_response("in_progress")),
            self._event("response.in_progress", response=self.write_response("in_progress")),
        ]

    def take(self, turn: ChatTurn) -> list[dict[str, Any]]:
        self.chat.take(turn)
        events = [event for said in turn.said for event in self._take(said)]
        status = "incomplete" if turn.delta.finish_reason == "length" else "completed"
        return [*events, *self._close(status)] if turn.delta.is_last else events

    def end(self) -> list[dict[str, Any]]:
        status = "incomplete" if self.chat.finish_reason == "length" else "completed"
        return [self._event(f"response.{status}", response=self.write_response(status))]

    def fail(self, text: str) -> list[dict[str, Any]]:
        error = {"code": "server_error", "message": text}
        return [self._event("response.failed", response=self.write_response("failed", error))]

    def _take(self, said: ChatDelta) -> list[dict[str, Any]]:
        if isinstance(said, ContentDelta):
            return self._grow("message", "output_text", said.text)
        if isinstance(said, ReasoningDelta):
            return self._grow("reasoning", "reasoning_text", said.text)
        return self._write_call(said) if isinstance(said, CallDelta) else []

    def _grow(self, kind: str, part: str, text: str) -> list[dict[str, Any]]:
        """More text of a message, or of reasoning; the item begins with its first text."""
        events = []
        if self._kind != kind:
            events = self._close()
            item: dict[str, Any] = {"type": kind, "id": make_id("msg" if kind == "message" else "rs")}
            item["role" if kind == "message" else "summary"] = "assistant" if kind == "message" else []
            if kind == "reasoning" and self.request.shows_reasoning_back:
                item["encrypted_content"] = None
            self.output.append({**item, "status": "in_progress", "content": []})
            self._kind = kind
            events.append(self._tell_item("added", self.output[-1] | {"content": []}))
            self.output[-1]["content"].append(write_part(part, ""))
            events.append(self._tell_part("response.content_part.added", part=write_part(part, "")))
        self.output[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*events, self._tell_part(f"response.{part}.delta", delta=text, **more)]

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        """The item that grows is complete, or was cut."""
        if not self._kind:
            return []
        kind, item = self._kind, self.output[-1]
        self._kind, item["status"] = "", status
        part = item["content"][0]
        if "encrypted_content" in item:
            item["encrypted_content"] = base64.b64encode(part["text"].encode()).decode()
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [
            self._tell_part(f"response.{part['type']}.done", text=part["text"], **more),
            self._tell_part("response.content_part.done", part=part),
            self._tell_item("done", item),
        ]

    def _write_call(self, call: CallDelta) -> list[dict[str, Any]]:
        events = self._close()
        item = {"type": "function_call", "id": make_id("fc"), "call_id": call.id, "name": call.name}
        self.output.append({**item, "arguments": call.arguments, "status": "completed"})
        started = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        told = "response.function_call_arguments"
        return [
            *events,
            self._tell_item("added", started),
            self._event(f"{told}.delta", **place, delta=call.arguments),
            self._event(f"{told}.done", **place, name=call.name, arguments=call.arguments),
            self._tell_item("done", self.output[-1]),
        ]

    def _tell_item(self, what: str, item: dict[str, Any]) -> dict[str, Any]:
        return self._event(f"response.output_item.{what}", output_index=len(self.output) - 1, item=item)

    def _tell_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


def route_responses(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/responses", responses=WHOLE_OR_EVENTS)
    async def respond_to(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        prompt = await write_chat(service, body.read_question())
        kept = {"skip_special_tokens": False, "stops": service.find_chat_stops()}
        limit, fields = body.max_output_tokens, body.read_sampling()
        params = fields.make_params(limit, None, prompt.constraint, prompt.names, **kept)
        writer = ResponseWriter(service, body, prompt)

        async def begin() -> AsyncIterator[tuple[int, ChatTurn]]:
            deltas = await service.submit([(prompt.tokens, params[0])], names=prompt.names)
            return read_chat(service, prompt, deltas, 1)

        async def answer() -> Response:
            async for _, turn in await begin():
                writer.take(turn)
            return respond(writer.end()[0]["response"])

        if not body.stream:
            return await unless_gone(request, answer())

        def write_failure(error: ApiError) -> str:
            return write_all(writer.fail(error.message))

        return stream(guarded(write_response_events(writer, await begin()), write=write_failure))

    return router


async def write_response_events(
    writer: ResponseWriter, turns: AsyncIterator[tuple[int, ChatTurn]]
) -> AsyncIterator[str]:
    try:
        yield write_all(writer.begin())
        async for _, turn in turns:
            if events := writer.take(turn):
                yield write_all(events)
        yield write_all(writer.end())
    finally:
        await turns.aclose()  # type: ignore[attr-defined]


def write_all(events: Sequence[dict[str, Any]]) -> str:
    return "".join(write_event(event, event["type"]) for event in events)


def write_format(form: TextFormat | None) -> dict[str, Any]:
    """As the published API tells it back."""
    if form is None or form.type != "json_schema":
        return {"type": form.type if form else "text"}
    named = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": bool(form.strict)}
    return {"type": form.type, **named}


def write_part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def make_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
