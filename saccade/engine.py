"""The engine: requests in, tokens out, one `step` at a time.

schedule -> batch -> forward -> sample -> commit. This is the only place that sees both requests and tensors, and the
only wait in a step is reading the chosen tokens back. It knows no files, no prompts in text, no threads: whoever calls
`add`, `step` and `cancel` does so from one thread. Next: scheduler.py decides, batch.py lays out, sample.py chooses.
"""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.batch import Batch, Buffers, Run
from saccade.cache import Cache
from saccade.errors import RequestError
from saccade.job import Job
from saccade.params import Defaults, SamplingParams, show
from saccade.sample import Choice, Row, Sampled, Spec, draw_uniform, join, sample
from saccade.scheduler import Chunk, Request, Scheduler, count_pages
from saccade.text import TextStream
from saccade.tokenizer import Tokenizer, require_tokenizer

LOGIT_ROWS = 128  # at once: 66 MB of f32 logits with DeepSeek's 129,280 tokens, however many rows are scored


class Model(Protocol):
    """What the engine asks of a model; model/transformer.py is one, graphs.py has another."""

    def forward(self, batch: Batch, cache: Cache, capture: list[Tensor] | None = None) -> Tensor: ...

    def logits(self, rows: Tensor) -> Tensor: ...


class Update(NamedTuple):
    """What one step added to a job."""

    job: Job
    tokens: list[int]
    text: str


class Engine:
    """Runs jobs on a model and its cache, as the scheduler says."""

    def __init__(
        self,
        model: Model,
        cache: Cache,
        scheduler: Scheduler,
        vocab_size: int,
        device: torch.device | str = "cpu",
        defaults: Defaults | None = None,
        tokenizer: Tokenizer | None = None,
        small: int = 0,
    ) -> None:
        """`cache` has `scheduler.pages.count` pages. `defaults` completes every request's params. Steps of up to
        `small` tokens have few shapes, for a model that keeps a CUDA graph of each."""
        self.model, self.cache, self.scheduler = model, cache, scheduler
        self.vocab_size, self.device = vocab_size, device
        self.defaults, self.tokenizer = defaults or Defaults(), tokenizer
        longest = min(scheduler.max_length, scheduler.capacity)
        buffers = (scheduler.max_batch_tokens, scheduler.max_requests, count_pages(longest))
        self.buffers = Buffers(device, *buffers, small)
        self.jobs: dict[Request, Job] = {}  # those that have not finished
        self.abandoned: list[Job] = []  # to be cancelled before the next step
        self.push: object | None = None  # of new weights, while one is open: there is at most one
        self.refusal: str | None = None  # why no request can be served: the weights are incomplete

    def add(self, tokens: Sequence[int], params: SamplingParams | None = None, capture: bool = False) -> Job:
        """Queue a prompt. Raises RequestError if it cannot be served. `capture` keeps every selection."""
        self._require_weights()
        params = self.defaults.complete(params or SamplingParams())
        if params.stop:
            require_tokenizer(self.tokenizer, "stop strings: finding them")
        self.check_tokens(tokens)
        seed = random.getrandbits(63) if params.seed is None else params.seed
        stream = TextStream(self.tokenizer.decode, params.stop) if self.tokenizer else None
        request = self.scheduler.add(tokens, params)
        return self._keep(Job(request, params, seed, stream, seen=[] if capture else None))

    def add_scoring(self, tokens: Sequence[int]) -> Job:
        """Queue at least two tokens to be scored: `job.scores` will be each one's log-probability given its prefix."""
        self._require_weights()
        self.check_tokens(tokens)
        request = self.scheduler.add_scoring(tokens)
        scores = [0.0] * len(request.tokens)
        return self._keep(Job(request, request.params, 0, None, scores=scores))

    def _require_weights(self) -> None:
        if self.refusal is not None:
            raise RequestError(self.refusal)

    def _keep(self, job: Job) -> Job:
        self.jobs[job.request] = job
        return job

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for the first token that the model does not have."""
        for place, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"token {show(token)} at place {place} is not in the vocabulary; ids are 0 to {self.vocab_size - 1}"
                )

    def cancel(self, job: Job) -> None:
        """End a job wherever it is; its pages are free at once. A finished job stays as it is."""
        self.scheduler.cancel(job.request)
        self.jobs.pop(job.request, None)

    def abandon(self, job: Job) -> None:
        """Cancel a job before the next step: safe at any moment, where `cancel` in the middle of a step is not.

        For finalizers, which run whenever garbage is collected, be it between two layers of a forward.
        """
        if job.finish_reason is None:
            self.abandoned.append(job)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one batch; what it added to which job. [] only if there is nothing to do."""
        while self.abandoned:
            self.cancel(self.abandoned.pop())
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        with on(self.device):
            batch = self._batch(chunks)
            hidden = self._forward(batch, chunks)
            sampled = self._sample(hidden, batch, chunks)
        return self._commit(chunks, sampled)

    def _batch(self, chunks: list[Chunk]) -> Batch:
        runs = []
        for chunk in chunks:
            request, start = chunk.request, chunk.request.computed
            tokens = request.tokens[start : start + chunk.size]
            tokens += request.draft[: chunk.size - len(tokens)]
            runs.append(Run(tokens, start, request.pages, count_rows(chunk)))
        return self.buffers.fill(runs)

    def _forward(self, batch: Batch, chunks: list[Chunk]) -> Tensor:
        """The hidden states of the batch; keeps the selections of those jobs that want them."""
        if all(self.jobs[chunk.request].seen is None for chunk in chunks):
            return self.model.forward(batch, self.cache)
        capture: list[Tensor] = []
        hidden = self.model.forward(batch, self.cache, capture)
        seen, first = torch.stack(capture).cpu(), 0  # [layers, T, K]: a second wait, paid for only where it is wanted
        for chunk in chunks:
            job = self.jobs[chunk.request]
            if job.seen is not None:
                job.seen.append((chunk.request.computed, seen[:, first : first + chunk.size].clone()))
            first += chunk.size
        return hidden

    def _sample(self, hidden: Tensor, batch: Batch, chunks: list[Chunk]) -> list[Choice]:
        """A choice for every row whose logits are wanted, in the order of the chunks."""
        rows = [row for chunk in chunks for row in self._want_rows(chunk)]
        if not rows:
            return []  # prefill only: the head, which is 2 GB of weights in DeepSeek-V3.2, is not even touched
        logprobs = max(self._count_logprobs(chunk.request) for chunk in chunks)
        parts: list[Sampled] = []
        for first in range(0, len(rows), LOGIT_ROWS):
            places = batch.logit_rows[first : first + LOGIT_ROWS]
            spec = Spec.build(rows[first : first + LOGIT_ROWS], len(places), logprobs, self.device)
            parts.append(sample(self.model.logits(hidden[places]), spec))
        return join(parts).read()

    def _want_rows(self, chunk: Chunk) -> list[Row]:
        """What the chunk's rows of logits are for: the targets it is scored by, or its next token and its drafts'."""
        request, job = chunk.request, self.jobs[chunk.request]
        if request.targets is not None:
            return [Row(target=t) for t in request.targets[request.computed : request.computed + chunk.size]]
        options = (job.params.temperature or 0.0, job.params.top_k or 0, job.params.top_p or 1.0)
        place = len(request.tokens)
        return [Row(*options, draw_uniform(job.seed, place + i)) for i in range(count_rows(chunk))]

    def _count_logprobs(self, request: Request) -> int:
        asked = self.jobs[request].params.logprobs
        return 0 if request.targets is not None else -1 if asked is None else asked

    def _commit(self, chunks: list[Chunk], sampled: list[Choice]) -> list[Update]:
        """Book what the step did: scores, accepted tokens, ends."""
        updates, first = [], 0
        for chunk in chunks:
            request, job = chunk.request, self.jobs[chunk.request]
            rows = sampled[first : first + count_rows(chunk)]
            first += len(rows)
            if request.targets is not None:
                job.scores[request.computed : request.computed + chunk.size] = [row.logprob for row in rows]
                reason = "length" if chunk.is_last else None
                self.scheduler.advance(chunk)
                tokens, text = list[int](), ""
            else:
                tokens, text, reason = self._accept(job, rows)
                self.scheduler.advance(chunk, tokens)
            if reason is not None:
                self.scheduler.finish(request, reason)
                del self.jobs[request]
            updates.append(Update(job, tokens, text))
        return updates

    def _accept(self, job: Job, rows: list[Choice]) -> tuple[list[int], str, str | None]:
        """The new tokens, their text, and why the job ends if it does.

        Row i was computed behind i draft tokens, so it counts while the drafts before it are what was sampled. The
        numbers that choose a token depend on its position alone: drafts change the speed, never the tokens.
        """
        request, tokens, text, reason = job.request, list[int](), "", None
        for i, (token, logprob, top) in enumerate(rows):
            if i > 0 and request.draft[i - 1] != tokens[-1]:
                break
            tokens.append(token)
            if job.params.logprobs is not None:
                job.logprobs.append(Choice(token, logprob, top[: job.params.logprobs]))
            if token in self.defaults.eos_token_ids and not job.params.ignore_eos:
                reason = "stop"
                break
            text += job.stream.push(token) if job.stream else ""
            if job.stream and job.stream.is_stopped:
                reason = "stop"
                break
            if len(request.tokens) + len(tokens) >= request.max_length:
                reason = "length"
                break
        if reason is not None and job.stream:
            text += job.stream.finish()
        job.text += text
        return tokens, text, reason


def on(device: torch.device | str) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one: Triton launches its kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()


def count_rows(chunk: Chunk) -> int:
    """Of how many of its last tokens a chunk wants logits: every one for scoring, else of the last and of drafts."""
    if chunk.request.targets is not None:
        return chunk.size
    return 1 + len(chunk.request.draft) if chunk.is_last else 0
