"""POST /v1/completions: text or token ids go on. With `echo` and `logprobs`, as evaluation harnesses ask.

Next: service.py, which answers; chat.py, for messages.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from saccade.server.apis.sampling import MOST_LOGPROBS, SamplingFields, refuse_field
from saccade.server.apis.types import WholeNumber, YesNo
from saccade.server.apis.usage import count_usage
from saccade.server.bodies import WHOLE_OR_EVENTS, JsonRoute, guarded, respond, stream, unless_gone, write_event
from saccade.server.service import Service, WholeAnswer, collect_answers
from saccade.server.wire import Counts, Delta, TokenRow

USUAL_TOKENS = 16  # of OpenAI's API


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[WholeNumber] | list[list[WholeNumber]]
    max_tokens: WholeNumber | None = Field(None, ge=0)
    logprobs: WholeNumber | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: YesNo = False
    suffix: str | None = None
    best_of: WholeNumber | None = None
    return_token_ids: YesNo = False  # as vLLM has it: texts of tokens may be alike

    @property
    def is_scoring(self) -> bool:
        """Whether the prompt alone is wanted, with its log-probabilities."""
        return self.max_tokens == 0


class CompletionWriter:
    """Writes the answers to one request: their places, log-probabilities and usage."""

    def __init__(self, service: Service, request: CompletionRequest, prompts: list[list[int]]) -> None:
        self.service, self.request, self.prompts = service, request, prompts
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = request.model or service.name
        self._offsets: dict[int, int] = {}

    def write_choice(self, place: int, delta: Delta, is_first: bool) -> dict[str, Any]:
        """What `delta` adds to the answer at `place`, with the prompt before it if that is wanted."""
        prompt, is_scored = self.prompts[place // self.request.count], self.request.logprobs is not None
        text, rows = (
            ("", list[TokenRow | None]()) if self.request.is_scoring else (delta.text, [*(delta.logprobs or [])])
        )
        if self.request.echo and is_first:
            text = self.service.decode(prompt) + text
            # Nothing comes before the first token that it could be likely after.
            rows = [None, *(delta.prompt_logprobs or []), *rows]
        logprobs = self._write_logprobs(place, rows, prompt[0]) if is_scored else None
        choice = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if self.request.return_token_ids:
            choice["token_ids"] = [] if self.request.is_scoring else delta.tokens
            choice |= {"prompt_token_ids": prompt} if is_first else {}
        return choice if delta.looked is None else choice | {"saccade": self.service.show_look(prompt, delta.looked)}

    def write_usage(self, generated: int, counts: Sequence[Counts]) -> dict[str, Any]:
        return count_usage(sum(map(len, self.prompts)), generated, counts, prompts=len(self.prompts))

    def _write_logprobs(self, place: int, rows: Sequence[TokenRow | None], first: int) -> dict[str, Any]:
        tokens = [self._show(first if row is None else row[0]) for row in rows]
        offset, offsets = self._offsets.get(place, 0), list[int]()
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        self._offsets[place] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if row is None else row[1] for row in rows],
            "top_logprobs": [self._write_top(row) for row in rows] if self.request.logprobs else None,
            "text_offset": offsets,
        }

    def _write_top(self, row: TokenRow | None) -> dict[str, float] | None:
        """The likeliest tokens, and the one that stands there."""
        return None if row is None else {self._show(t): logprob for t, logprob in [*row[2], (row[0], row[1])]}

    def _show(self, token: int) -> str:
        """A token as text; one that is a part of a character as OpenAI spells it."""
        raw = self.service.spell(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def route_completions(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", responses=WHOLE_OR_EVENTS)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on from a text or from token ids."""
        service.check_model(body.model)
        check_completion(body)
        prompts = [await read_prompt(service, prompt) for prompt in list_prompts(body.prompt)]
        writer = CompletionWriter(service, body, prompts)
        limit = USUAL_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        params = body.make_params(limit, body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)
        asked = [(tokens, each) for tokens in prompts for each in params]
        capture = body.wants_look(service.engine.ready.config, limit * len(prompts))

        async def answer() -> Response:
            deltas = await service.submit(asked, capture)
            answers = await collect_answers(deltas, len(asked))
            return respond(write_whole(writer, answers))

        if not body.stream:
            return await unless_gone(request, answer())
        return stream(guarded(write_events(writer, await service.submit(asked, capture)), "data: [DONE]\n\n"))

    return router


def check_completion(body: CompletionRequest) -> None:
    """Refuse by name what is not done here, unless it changes nothing."""
    if body.suffix:
        raise refuse_field("suffix", "text between a prompt and a suffix is not supported")
    if body.best_of not in (None, body.count):
        raise refuse_field("best_of", f"not supported; expected none, or n ({body.count})")
    if body.is_scoring and not body.echo:
        raise refuse_field("max_tokens", "expected at least 1; 0 is for echo=true")
    if body.stream_options is not None and not body.stream:
        raise refuse_field("stream_options", "allowed with stream=true only")


def list_prompts(prompt: Any) -> list[str | list[int]]:
    """One or several prompts as a list. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refuse_field("prompt", "expected text, token ids, or a list of them; found an empty list")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


async def read_prompt(service: Service, prompt: str | list[int]) -> list[int]:
    tokens = await service.encode(prompt) if isinstance(prompt, str) else prompt
    if not tokens:
        raise refuse_field("prompt", "a prompt is empty; expected at least one token")
    return tokens


def write_whole(writer: CompletionWriter, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
    choices = [writer.write_choice(i, a.as_delta(), True) for i, a in enumerate(answers)]
    tokens = 0 if writer.request.is_scoring else sum(len(a.tokens) for a in answers)
    usage = writer.write_usage(tokens, [a.counts for a in answers])
    return {**writer.head, "choices": choices, "usage": usage}


async def write_events(writer: CompletionWriter, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[str]:
    generated, counts, seen = 0, dict[int, Counts](), set[int]()
    try:
        async for place, delta in deltas:
            generated += 0 if writer.request.is_scoring else len(delta.tokens)
            counts[place] = delta.counts
            choice = writer.write_choice(place, delta, place not in seen)
            seen.add(place)
            yield write_event({**writer.head, "choices": [choice]})
        if writer.request.wants_usage:
            usage = writer.write_usage(generated, [counts[place] for place in sorted(counts)])
            yield write_event({**writer.head, "choices": [], "usage": usage})
    finally:
        await deltas.aclose()  # type: ignore[attr-defined]
