"""What all APIs share: the model's name, text to tokens and back, prompts to answers, limits on the way.

Knows no API's fields. Next: apis/completions.py, the simplest of those that use it; engine/client.py behind it.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from saccade.base.values import show
from saccade.chat.types import ChatFormat
from saccade.engine.params import SamplingParams
from saccade.errors import NoAnswerError, NumericsError, RequestError, SaccadeError
from saccade.look.selected import LookedAnswer, spell_piece
from saccade.server.engine.answers import Answers, EngineDown, ServedEngine
from saccade.server.engine.wire import Counts, Delta, Looked, TokenRow
from saccade.server.guard import make_ending
from saccade.server.metrics import AnswerClock, ServerMetrics
from saccade.server.refusals import NO_NAMES, TOO_LONG, ApiError, blame_field, name_model
from saccade.server.settings import ServeSettings
from saccade.text.detokenize import TextOffsets
from saccade.text.token_bytes import TokenBytes
from saccade.text.tokenizer import Tokenizer, TooLongError, require_tokenizer

ERRORS: dict[str, type[SaccadeError]] = {"not_finite": NumericsError, "no_answer": NoAnswerError}  # by Delta.error_kind
LONG = 1 << 13  # characters of a text that is encoded beside the event loop: 2 ms
COUNTED = 4  # contexts, up to which tokens are counted for clients that ask how many a text has
T = TypeVar("T")
PromptWithParams = tuple[list[int], SamplingParams]


class WholeAnswer:
    """One complete answer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[TokenRow] = []
        self.prompt_logprobs: list[TokenRow] | None = None
        self.finish_reason: str | None = None
        self.counts = Counts()
        self.looked: Looked | None = None

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.text += delta.text
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason, self.counts, self.looked = delta.finish_reason, delta.counts, delta.looked

    def as_delta(self) -> Delta:
        reason, prompt = self.finish_reason, self.prompt_logprobs
        return Delta(self.tokens, self.text, self.logprobs, reason, None, self.counts, prompt, self.looked)


class Service:
    """A model that is served."""

    def __init__(
        self,
        engine: ServedEngine,
        tokenizer: Tokenizer | None,
        obstacle: str,
        chat: ChatFormat | str,
        names: Sequence[str],
        settings: ServeSettings,
    ) -> None:
        """`obstacle`: why there is no tokenizer, where there is none. `chat`: how the model writes chats, or why it
        cannot. `names`: of the model; the first is its own."""
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.names, self.chat, self.obstacle = tuple(names), chat, obstacle
        self.bytes = TokenBytes(tokenizer) if tokenizer else None
        self.metrics = ServerMetrics(engine)
        self.started = int(time.time())
        self.is_ending = False

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for another model than this one. A request may leave the name out."""
        if name is not None and name not in self.names:
            raise name_model(name, self.names)

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer can have."""
        return self.engine.ready.longest

    def encode(self, text: str, is_rendered: bool = False, contexts: int = 1) -> list[int]:
        """The token ids of a text. `is_rendered`: it spells out the special tokens that it should have. TooLongError
        for one of far more than so many `contexts`."""
        tokenizer = require_tokenizer(self.tokenizer, "a text prompt", self.obstacle)
        encode = tokenizer.encode_rendered if is_rendered else tokenizer.encode
        return encode(text, contexts * self.longest)

    def find_room(self, prompt: int) -> int:
        """How many tokens an answer to so many can have. TooLongError for none."""
        room = self.longest - prompt
        if room < 1:
            text = f"the prompt is too long: {prompt:,} tokens; context and cache have room for {self.longest:,}"
            raise TooLongError(f"{text}, the answer included")
        return room

    def check_count(self, count: int) -> None:
        """ApiError for more answers than one request may ask for."""
        if count > self.settings.max_prompts:
            text = f"{count:,} answers in one request; expected {self.settings.max_prompts:,} at most"
            raise ApiError(400, text, "prompt")

    def decode(self, tokens: Sequence[int]) -> str:
        return require_tokenizer(self.tokenizer, "text", self.obstacle).decode(tokens)

    def find_offsets(self, skips: bool, before: Sequence[int] = (), start: int = 0) -> TextOffsets:
        """Tells where tokens begin in the text that they are. `skips`: it leaves special tokens out."""
        if self.tokenizer is None:
            return TextOffsets(lambda tokens: "", {})
        decode = self.tokenizer.decode if skips else self.tokenizer.decode_whole
        return TextOffsets(decode, self.tokenizer.hidden if skips else {}, before, start)

    def find_chat_stops(self) -> tuple[str, ...]:
        return () if isinstance(self.chat, str) else self.chat.stops

    def find_special_tokens(self) -> dict[str, str | None]:
        """The token that begins a prompt and the first that ends an answer, as text."""
        begin = self.tokenizer.bos_token_id if self.tokenizer else None
        end = next(iter(self.engine.ready.eos_token_ids), None)
        pairs = (("bos_token", begin), ("eos_token", end))
        return {name: None if token is None else self.spell(token).decode(errors="replace") for name, token in pairs}

    def check_tokens(self, tokens: Sequence[int], field: str = "tokens") -> None:
        """ApiError, naming the request's field, for the first token that the model does not have."""
        size = self.engine.ready.config.vocab_size
        for place, token in enumerate(tokens):
            if not 0 <= token < size:
                text = f"token {show(token)} at place {place} is not in the vocabulary; ids are 0 to {size - 1}"
                raise ApiError(400, f"{field}: {text}", field)

    def spell(self, token: int) -> bytes:
        """The bytes of one token, special ones too."""
        return self.bytes.find(token) if self.bytes else str(token).encode()

    def show_look(self, prompt: Sequence[int], looked: Looked) -> dict[str, Any]:
        """Where an answer looked, its tokens as text."""
        asked, answer = ([spell_piece(self.spell(token)) for token in side] for side in (prompt, looked.tokens))
        return LookedAnswer(asked, answer, looked.selected).to_json()

    async def submit(
        self, prompts: Sequence[PromptWithParams], capture: bool = False, names: Mapping[str, str] = NO_NAMES
    ) -> AsyncIterator[tuple[int, Delta]]:
        """Queue prompts, all or none; their answers as they come, by place. Close the iterator in any case. `capture`:
        the last piece of each tells where it looked. `names`: what the request calls fields of SamplingParams, and
        the prompt, for errors.

        ApiError: 400 for what cannot be served, 429 for a full queue, 503 if the server ends or has no engine. While
        answers come: EngineDown, or NoAnswerError for one that has none (NumericsError: its numbers are not finite).
        """
        if self.is_ending:
            raise make_ending()
        self.check_count(len(prompts))
        self._require_room(len(prompts))
        clocks = [AnswerClock(self.metrics) for _ in prompts]
        try:
            answers = await self.engine.submit(prompts, capture)
        except BaseException as error:
            left = isinstance(error, asyncio.CancelledError)
            for clock in clocks:
                clock.end("refused" if isinstance(error, RequestError) else "cancelled" if left else "error")
            if isinstance(error, RequestError):
                told = blame_field(str(error), names)
                is_long = told.param in [names.get(name, name) for name in ("prompt", "max_tokens")]
                is_too_long = is_long and any(self._is_too_long(*each) for each in prompts)
                told.code = TOO_LONG if is_too_long else None  # a word that agents know: they shorten, and ask again
                raise told from None
            raise
        counted = set[int]()
        for clock, (tokens, _) in zip(clocks, prompts, strict=True):
            clock.take(None if id(tokens) in counted else len(tokens))  # answers to one prompt share the list
            counted.add(id(tokens))
        return self._read(answers, clocks)

    async def _read(self, answers: Answers, clocks: Sequence[AnswerClock]) -> AsyncIterator[tuple[int, Delta]]:
        try:
            async for place, delta in answers:
                clocks[place].note(delta)
                if delta.error is not None:
                    raise ERRORS.get(delta.error_kind, SaccadeError)(delta.error)
                yield place, delta
        except EngineDown:
            for clock in clocks:
                clock.end("error")
            raise
        finally:
            answers.close()
            for clock in clocks:
                clock.end("cancelled")

    def _is_too_long(self, tokens: Sequence[int], params: SamplingParams) -> bool:
        return len(tokens) + (params.max_tokens or 1) > self.longest

    def _require_room(self, count: int) -> None:
        """ApiError 429 if so many prompts more would wait. A request that is longer than the queue gets in when nobody
        else is there."""
        engine, running = self.engine, self.engine.unanswered
        limit = engine.ready.max_requests + self.settings.max_queue
        if engine.failure is None and running and running + count > limit:
            turns = running / engine.ready.max_requests
            seconds = max(1, min(60, math.ceil(turns * self.metrics.mean_seconds)))
            text = f"{running} requests run or wait already, of {limit} at most; try again in {seconds} seconds"
            raise ApiError(429, text, code="queue_full", headers={"retry-after": str(seconds)})


async def beside(work: Callable[[], T], size: int) -> T:
    """What `work` returns; beside the event loop if it reads more than LONG characters or token ids."""
    return await asyncio.to_thread(work) if size > LONG else work()


async def collect_answers(deltas: AsyncIterator[tuple[int, Delta]], count: int) -> list[WholeAnswer]:
    """The complete answers of an iterator that `Service.submit` gave."""
    answers = [WholeAnswer() for _ in range(count)]
    async for place, delta in deltas:
        answers[place].add(delta)
    return answers
