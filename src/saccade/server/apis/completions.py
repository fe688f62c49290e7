"""POST /v1/completions: text or token ids go on. With `echo` and `logprobs`, as evaluation harnesses ask.

Next: service.py, which answers; chat.py, for messages.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from saccade.errors import RequestError
from saccade.server.apis.constraints import find_constraint
from saccade.server.apis.sampling import MOST_LOGPROBS, SamplingFields, refuse_field
from saccade.server.apis.types import Unserved, WholeNumber, YesNo
from saccade.server.apis.usage import count_usage, write_prompt_logprobs
from saccade.server.bodies import WHOLE_OR_EVENTS, JsonRoute, guarded, respond, stream, unless_gone, write_event
from saccade.server.engine.wire import Counts, Delta, TokenRow
from saccade.server.refusals import blame_request
from saccade.server.service import Service, WholeAnswer, beside, collect_answers
from saccade.text.detokenize import TextOffsets

USUAL_TOKENS = 16  # of OpenAI's API


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[WholeNumber] | list[list[WholeNumber]]
    max_tokens: WholeNumber | None = Field(None, ge=0)
    logprobs: WholeNumber | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: YesNo | None = None
    add_special_tokens: YesNo | None = None
    suffix: Annotated[Any, Unserved("text between a prompt and a suffix is not supported", "")] = None
    best_of: WholeNumber | None = None
    prompt_embeds: Annotated[Any, Unserved("prompts are text or token ids")] = None
    thinking_token_budget: Annotated[Any, Unserved("of chats", -1)] = None

    @property
    def is_scoring(self) -> bool:
        """Whether the prompt alone is wanted, with its log-probabilities."""
        return self.max_tokens == 0


class CompletionWriter:
    """Writes the answers to one request: their places, log-probabilities and usage."""

    def __init__(self, service: Service, request: CompletionRequest, prompts: list[list[int]]) -> None:
        self.service, self.request, self.prompts = service, request, prompts
        self.head: dict[str, Any] = {
            "id": f"cmpl-{request.request_id or uuid.uuid4().hex}",
            "object": "text_completion",
        }
        self.head |= {"created": int(time.time()), "model": request.model or service.name}
        self._offsets: dict[int, TextOffsets] = {}

    def write_choice(self, place: int, delta: Delta, is_first: bool) -> dict[str, Any]:
        """What `delta` adds to the answer at `place`, with the prompt before it if that is wanted."""
        request, prompt = self.request, self.prompts[place // self.request.count]
        text = "" if request.is_scoring else delta.text
        rows = [] if request.is_scoring else delta.logprobs or []
        logprobs: dict[str, Any] | None = None
        if request.logprobs is not None:
            logprobs = self._write_logprobs(place, rows, delta.prompt_logprobs or [] if is_first else None)
        if request.echo and is_first:
            text = self.service.decode(prompt) + text
        choice = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if request.prompt_logprobs is not None:
            rows = delta.prompt_logprobs or []
            choice["prompt_logprobs"] = write_prompt_logprobs(self.service, rows, request.prompt_logprobs)
        if request.return_token_ids:
            choice["token_ids"] = [] if request.is_scoring else delta.tokens
            choice |= {"prompt_token_ids": prompt} if is_first else {}
        return choice if delta.looked is None else choice | {"saccade": self.service.show_look(prompt, delta.looked)}

    def write_usage(self, generated: int, counts: Sequence[Counts]) -> dict[str, Any]:
        return count_usage(sum(map(len, self.prompts)), generated, counts, prompts=len(self.prompts))

    def _write_logprobs(
        self, place: int, rows: Sequence[TokenRow], before: Sequence[TokenRow] | None
    ) -> dict[str, Any]:
        """`before`: rows of the prompt, with the first piece of an answer."""
        prompt, skips = self.prompts[place // self.request.count], self.request.skip_special_tokens is not False
        written, offsets = list[TokenRow | None](rows), list[int]()
        if before is not None:
            start = 0
            if self.request.echo:  # nothing comes before the first token that it could be likely after
                written = [None, *before, *rows]
                echoed = self.service.find_offsets(skips=True)
                offsets += [echoed.take(token) for token in prompt]
                start = len(self.service.decode(prompt))
            self._offsets[place] = self.service.find_offsets(skips, prompt, start)
        offsets += [self._offsets[place].take(row[0]) for row in rows]
        return {
            "tokens": [self._show(prompt[0] if row is None else row[0]) for row in written],
            "token_logprobs": [None if row is None else row[1] for row in written],
            "top_logprobs": [self._write_top(row) for row in written] if self.request.logprobs else None,
            "text_offset": offsets,
        }

    def _write_top(self, row: TokenRow | None) -> dict[str, float] | None:
        """The likeliest tokens, and the one that stands there."""
        if row is None:
            return None
        return {self._show(t): logprob for t, logprob in [*row[2][: self.request.logprobs], (row[0], row[1])]}

    def _show(self, token: int) -> str:
        """A token as text, or as its id; one that is a part of a character as OpenAI spells it."""
        if self.request.return_tokens_as_token_ids:
            return f"token_id:{token}"
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
        is_rendered = body.add_special_tokens is False
        prompts = await read_prompts(service, list_prompts(body.prompt), body.count, is_rendered)
        writer = CompletionWriter(service, body, prompts)
        limit = USUAL_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        asked_for = find_constraint(body)
        if asked_for is not None:
            asked_for.check()
        constraint = {} if asked_for is None else {asked_for.name: asked_for.value}
        names = {} if asked_for is None else {asked_for.name: asked_for.field}
        scores = [most for most in (body.prompt_logprobs, body.logprobs if body.echo else None) if most is not None]
        params = body.make_params(limit, body.logprobs, constraint, names, prompt_logprobs=max(scores, default=None))
        asked = [(tokens, each) for tokens in prompts for each in params]
        capture = body.wants_look(service.engine.ready.config, limit * len(prompts))

        async def answer() -> Response:
            deltas = await service.submit(asked, capture, names)
            answers = await collect_answers(deltas, len(asked))
            return respond(write_whole(writer, answers))

        if not body.stream:
            return await unless_gone(request, answer())
        return stream(guarded(write_events(writer, await service.submit(asked, capture, names)), "data: [DONE]\n\n"))

    return router


def check_completion(body: CompletionRequest) -> None:
    """Refuse by name what is not done here, unless it changes nothing."""
    body.check_stream()
    if body.best_of not in (None, body.count):
        raise refuse_field("best_of", f"not supported; expected none, or n ({body.count})")
    if body.is_scoring and not body.echo:
        raise refuse_field("max_tokens", "expected at least 1; 0 is for echo=true")


def list_prompts(prompt: Any) -> list[str | list[int]]:
    """One or several prompts as a list. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refuse_field("prompt", "expected text, token ids, or a list of them; found an empty list")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


async def read_prompts(
    service: Service, prompts: Sequence[str | list[int]], count: int, is_rendered: bool
) -> list[list[int]]:
    """The token ids of all prompts, each of which wants `count` answers."""
    service.check_count(len(prompts) * count)
    size = sum(map(len, prompts))
    return await beside(lambda: [read_prompt(service, prompt, is_rendered) for prompt in prompts], size)


def read_prompt(service: Service, prompt: str | list[int], is_rendered: bool) -> list[int]:
    try:
        tokens = service.encode(prompt, is_rendered) if isinstance(prompt, str) else prompt
        service.find_room(len(tokens))
    except RequestError as error:
        raise blame_request(error) from None
    if not tokens:
        raise refuse_field("prompt", "a prompt is empty; expected at least one token")
    if tokens is prompt:
        service.check_tokens(tokens, "prompt")
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
