"""An engine whose answers are written in advance, in pieces of any size: for tests of what stands before an engine."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from saccade.api.loading.side_files import read_side_files
from saccade.chat.deepseek import DeepSeekFormat
from saccade.chat.types import ChatFormat
from saccade.checkpoint.open import bundled_path, open_model
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError
from saccade.server.engine.answers import Answers, EngineDown
from saccade.server.engine.wire import Counts, Delta, Load, Ready
from saccade.server.service import Service
from saccade.server.settings import ServeSettings

Script = Callable[[list[int], SamplingParams], list[Delta]]


class ScriptedEngine:
    """Answers each prompt with what `script` makes of it, one Delta after each `pause`."""

    def __init__(self, script: Script, path: Path | None = None, max_requests: int = 64) -> None:
        path = path or bundled_path()
        config, _ = open_model(path)
        ends = tuple(config.eos_token_ids)
        length = config.max_position_embeddings
        self.ready = Ready(str(path), config, length, length, max_requests, ends, 0, "scripted")
        self.script, self.load = script, Load()
        self.failure: str | None = None
        self.unanswered = 0
        self.pause = 0.0  # seconds before each Delta
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]], capture: bool = False) -> Answers:
        if self.failure is not None:
            raise EngineDown(self.failure)
        for tokens, params in prompts:
            if len(tokens) + (params.max_tokens or 1) > self.ready.max_length:
                raise RequestError(f"{len(tokens)} prompt tokens: too long")
            if not all(0 <= token < self.ready.config.vocab_size for token in tokens):
                raise RequestError("a token is not in the vocabulary")
        answers = Answers(lambda closed: None, len(prompts))
        self.prompts += [tokens for tokens, _ in prompts]
        self.params += [params for _, params in prompts]
        task = asyncio.create_task(self._answer(answers, prompts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answers

    async def _answer(self, answers: Answers, prompts: Sequence[tuple[list[int], SamplingParams]]) -> None:
        for place, (tokens, params) in enumerate(prompts):
            for delta in self.script(tokens, params):
                await asyncio.sleep(self.pause)
                answers.put(place, delta)


def say_text(text: str, size: int = 4, reason: str = "stop") -> list[Delta]:
    """`text` in pieces of `size` characters; each counts as one token."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    last = len(pieces) - 1
    return [Delta([0], piece, None, reason if i == last else None, None, Counts()) for i, piece in enumerate(pieces)]


def make_service(
    engine: ScriptedEngine, settings: ServeSettings | None = None, chat: ChatFormat | None = None
) -> Service:
    side = read_side_files(engine.ready.path, engine.ready.config.eos_token_ids, engine.ready.config.vocab_size)
    form, settings = chat or DeepSeekFormat(), settings or ServeSettings()
    return Service(engine, side.tokenizer, side.obstacle, form, ("scripted",), settings)
