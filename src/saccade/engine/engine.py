"""The engine: requests in, tokens out, one `step` at a time.

schedule -> batch -> forward -> sample, with drafts behind it if there are any -> commit. This is the only place that
sees both requests and tensors, and the only wait in a step is reading the chosen tokens back. It knows no files, no
prompts in text, no threads: of `add`, `step` and `cancel` one runs at a time (shared.py). Next: scheduler.py decides,
buffers.py lays out, sample.py chooses, speculate.py drafts.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.base.memory import naming_memory
from saccade.base.values import show
from saccade.engine.buffers import Buffers, Run
from saccade.engine.causes import Causes, Failures
from saccade.engine.model import Runner
from saccade.engine.pace import Pace, Tally
from saccade.engine.pages import clear_states
from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.request import HeldParts, Job, StepSelections, list_spans
from saccade.engine.sample import NOT_FINITE, NOTHING_LEFT, Choice, Spec, draw_uniform, sample_rows
from saccade.engine.sampling.change import Change
from saccade.engine.sampling.want import Wanted, count_logit_rows, count_logprobs, count_prompt_rows, want_rows
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.page_pool import count_pages
from saccade.engine.scheduling.requests import Chunk, Request
from saccade.engine.speculate import Ask, fill_columns, find_kind
from saccade.engine.speculate import RunStep as RunDrafts
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.ops.device import on
from saccade.ops.step import Batch, Cache
from saccade.text.detokenize import TextStream
from saccade.text.tokenizer import NO_TOKENIZER, Tokenizer, require_tokenizer


class Update(NamedTuple):
    """What one step added to a job."""

    job: Job
    tokens: list[int]
    text: str


class Engine:
    """Runs jobs on a model and its cache, as the scheduler says."""

    has_others = False  # ranks that are told what is done here

    def __init__(
        self,
        model: Runner,
        cache: Cache,
        scheduler: Scheduler,
        vocab_size: int,
        device: torch.device | str = "cpu",
        defaults: Defaults | None = None,
        tokenizer: Tokenizer | None = None,
        small: int = 0,
        run_drafts: RunDrafts | None = None,
        speculate: int | str = 0,
        causes: Causes | None = None,
    ) -> None:
        """`cache` has `scheduler.pages.count` pages. `defaults` completes every request's params. Steps of up to
        `small` tokens have few shapes, for a model that keeps a CUDA graph of each. `speculate`: drafts of a step, or
        "auto"; made by `run_drafts`, which the cache has a pool for. `causes` looks into the model when numbers are not
        finite."""
        self.model, self.cache, self.scheduler = model, cache, scheduler
        self.vocab_size, self.device = vocab_size, device
        self.defaults, self.tokenizer = defaults or Defaults(), tokenizer
        longest = min(scheduler.max_length, scheduler.capacity)
        buffers = (scheduler.max_batch_tokens, scheduler.max_requests, count_pages(longest))
        self.buffers = Buffers(device, *buffers, small, bool(cache.states))
        self._run_drafts = run_drafts if speculate else None
        self.speculate = speculate if run_drafts else 0
        self.pace, self.tally = Pace(), Tally()  # of all requests
        self.jobs: dict[Request, Job] = {}  # those that have not finished
        self._in_step: list[Request] = []  # those of the last step
        self.wanted = Wanted(scheduler.max_requests, vocab_size, device, self.defaults, tokenizer)
        self.causes, self.failures = causes, Failures(causes, scheduler, self.buffers, cache, device)
        # Around what may be interrupted in a step: a forward. The rest counts on itself being whole.
        self.interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
        self.push: object | None = None  # of new weights, while one is open: there is at most one
        self.no_text = NO_TOKENIZER  # why there is no tokenizer, where there is none
        self.refusal: str | None = None  # why no request can be served: the weights are incomplete

    def allow_interrupts(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """`around`: what a forward is wrapped in, so that it may be interrupted."""
        self.interruptible = around

    def add(self, tokens: Sequence[int], params: SamplingParams | None = None, capture: bool = False) -> Job:
        """Queue a prompt. Raises RequestError if it cannot be served. `capture` keeps every selection."""
        self._require_weights()
        params = self.defaults.complete(params or SamplingParams())
        if params.stop:
            require_tokenizer(self.tokenizer, "stop strings: finding them", self.no_text)
        self.check_tokens(tokens)
        seed = random.getrandbits(63) if params.seed is None else params.seed
        self.wanted.grammars.obstacle = self.no_text
        match = self.wanted.start(params)
        stream = open_text(self.tokenizer, params, tokens) if self.tokenizer else None
        # What is found in the prefix cache has neither selections nor logits.
        is_whole = capture or params.prompt_logprobs is not None
        request = self.scheduler.add(tokens, params, is_whole=is_whole)
        job = Job(request, params, seed, stream, seen=HeldParts() if capture else None, match=match)
        job.prompt_logprobs = None if params.prompt_logprobs is None else []
        return self._keep(job)

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
        self._drop(job.request)

    def fail(self, error: Exception) -> bool:
        """End with `error` the jobs of the step that raised it, or all if none was under way; whether there was one."""
        jobs = [self.jobs[r] for r in self._in_step if r in self.jobs] or list(self.jobs.values())
        for job in jobs:
            job.failure = error
            self.scheduler.finish(job.request, "error")
            self._drop(job.request)
        return bool(jobs)

    def _drop(self, request: Request) -> None:
        self.jobs.pop(request, None)
        self.wanted.forget(request)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one batch; what it added to which job. [] only if there is nothing to do."""
        start, self._in_step = time.perf_counter(), []
        drafts = self._choose_drafts()
        chunks = self.scheduler.schedule(drafts)
        self._in_step = [chunk.request for chunk in chunks]
        if not chunks:
            return []
        is_timed = self.speculate == "auto" and is_steady(chunks, drafts)
        memory = naming_memory("a step's activations", "smaller steps: fewer max_batch_tokens")
        with on(self.device), memory, self.interruptible():
            try:
                batch = self._batch(chunks)
                sampled, guesses, seen = self._run(batch, chunks, drafts)
            except BaseException:
                self._rewind(chunks)
                raise
        updates = self._commit(chunks, sampled, guesses, seen)
        if is_timed:
            self.pace.note_time(len(chunks), drafts, time.perf_counter() - start)
        return updates

    def tell(self, head: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """Tell the other ranks, if there are any. In a turn."""

    def explain_failures(self) -> None:
        """Add causes to the errors of jobs whose numbers were not finite. Between steps."""
        self.failures.explain()

    def _choose_drafts(self) -> int:
        """How many drafts this step makes for each request. Older drafts beyond that are not verified."""
        if self._run_drafts is None:
            return 0
        running = [request for request in self.scheduler.running if request.targets is None]
        count = self.speculate if isinstance(self.speculate, int) else self.pace.choose(max(1, len(running)))
        for request in running:
            del request.draft[count:]
            self.wanted.cut_guesses(self.jobs[request])
        if count:
            self.scheduler.catch_up()
        return count

    def _batch(self, chunks: list[Chunk]) -> Batch:
        runs = []
        for chunk in chunks:
            request, start = chunk.request, chunk.request.computed
            tokens = request.tokens[start : start + chunk.size]
            tokens += request.draft[: chunk.size - len(tokens)]
            runs.append(
                Run(
                    tokens,
                    start,
                    request.pages,
                    count_logit_rows(chunk, self.jobs[request]),
                    max(0, chunk.ahead - 1),
                    request.slot,
                )
            )
        clear_states(self.cache, [chunk.request.slot for chunk in chunks if chunk.request.computed == 0])
        return self.buffers.fill(runs)

    def _rewind(self, chunks: list[Chunk]) -> None:
        """After a step that did not end. Cache rows are written again by the next one; states may have gone on, some
        layers' and not others', so that their requests begin anew."""
        if self.cache.states:
            for chunk in chunks:
                chunk.request.computed = 0

    def _run(
        self, batch: Batch, chunks: list[Chunk], drafts: int
    ) -> tuple[list[Choice], Sequence[list[int] | None], Sequence[Tensor | None]]:
        """A choice for every row whose logits are wanted, in the order of the chunks; for each chunk new drafts, or
        None if the drafting layer did not run; and what it selected, or None if nobody wants it."""
        # Without drafts the layer still follows prompts: to make up for one later would be to run it again.
        needed = any(c.request.targets is None and (drafts or c.request.pending > 1) for c in chunks)
        capture = self._open_capture(batch, chunks)
        if self._run_drafts is None or not needed:
            hidden = self.model.forward(batch, self.cache, capture)
            self._send_selections(capture, chunks)
            sampled = self._sample(hidden, batch, chunks)
            return sampled, [None] * len(chunks), self._receive_selections(capture, chunks)
        made = drafts if any(chunk.ahead for chunk in chunks) else 0
        changes = iter(self.wanted.list_changes(chunks, self.jobs))
        asks = [self._ask(chunk, made, changes) for chunk in chunks]
        kind = find_kind(asks, made, self._count_logprobs(chunks))
        flat, seen = fill_columns(asks, batch, made), self.wanted.find_table(kind.changes)
        outcome = self._run_drafts(batch, self.cache, flat, kind, capture, seen)
        self._send_selections(capture, chunks)
        if made:
            result = outcome.sampled.read_beside(outcome.drafts)
        else:
            result = outcome.sampled.read() if len(batch.logit_rows) else [], [[] for _ in chunks]
        return *result, self._receive_selections(capture, chunks)

    def _ask(self, chunk: Chunk, drafts: int, changes: Iterator[Change]) -> Ask:
        """`changes`: those of all rows that are left."""
        request, job = chunk.request, self.jobs[chunk.request]
        start, place = request.computed + 1, len(request.tokens)
        following = (request.tokens[start : start + chunk.size] + request.draft)[: chunk.size]
        following += [0] * (chunk.size - len(following))
        is_random = chunk.ahead > 0 and bool(job.params.temperature)
        uniforms = [draw_uniform(job.seed, place + i) for i in range(2 * drafts + 1)] if is_random else []
        rows = want_rows(chunk, job)
        return Ask(rows, request.draft, following, uniforms, list(islice(changes, len(rows))))

    def _open_capture(self, batch: Batch, chunks: list[Chunk]) -> StepSelections | None:
        """What takes the selections of a step, if anybody in it wants them."""
        is_wanted = any(self.jobs[chunk.request].seen is not None for chunk in chunks)
        return StepSelections(batch.page_table.shape[1] * PAGE) if is_wanted else None

    def _send_selections(self, capture: StepSelections | None, chunks: list[Chunk]) -> None:
        """Their copy to the host, while the choice of tokens is launched."""
        if capture is not None:
            is_wanted = [self.jobs[chunk.request].seen is not None for chunk in chunks]
            capture.send(list(list_spans([chunk.size for chunk in chunks], is_wanted)))

    def _receive_selections(self, capture: StepSelections | None, chunks: list[Chunk]) -> list[Tensor | None]:
        """The rows of each chunk that wants them."""
        if capture is None:
            return [None] * len(chunks)
        is_wanted = [self.jobs[chunk.request].seen is not None for chunk in chunks]
        sizes = [chunk.size if wanted else 0 for chunk, wanted in zip(chunks, is_wanted, strict=True)]
        parts = capture.receive().split(sizes)
        return [part if wanted else None for part, wanted in zip(parts, is_wanted, strict=True)]

    def _sample(self, hidden: Tensor, batch: Batch, chunks: list[Chunk]) -> list[Choice]:
        """A choice for every row whose logits are wanted, in the order of the chunks."""
        rows = [row for chunk in chunks for row in want_rows(chunk, self.jobs[chunk.request])]
        if not rows:
            return []  # prefill only: the head, which is 2 GB of weights in DeepSeek-V3.2, is not even touched
        length = len(batch.logit_rows)
        spec = Spec.build(rows, length, self._count_logprobs(chunks), self.device)
        changes = self.wanted.take_changes(chunks, self.jobs, length)  # while the device computes what was launched
        return sample_rows(self.model.logits, hidden, batch.logit_rows, spec, changes).read()

    def _count_logprobs(self, chunks: list[Chunk]) -> int:
        return max(count_logprobs(chunk, self.jobs[chunk.request]) for chunk in chunks)

    def _commit(
        self,
        chunks: list[Chunk],
        sampled: list[Choice],
        guesses: Sequence[list[int] | None],
        seen: Sequence[Tensor | None],
    ) -> list[Update]:
        """Book what the step did: scores, accepted tokens, new drafts, selections, ends."""
        updates, first = [], 0
        for chunk, drafts, selected in zip(chunks, guesses, seen, strict=False):  # rows of padding are left over
            request, job, start = chunk.request, self.jobs[chunk.request], chunk.request.computed
            rows = sampled[first : first + count_logit_rows(chunk, job)]
            first += len(rows)
            known = count_prompt_rows(chunk, job)
            if request.targets is not None:
                reason = self._keep_scores(job, rows, chunk)
                self.scheduler.advance(chunk)
                tokens, text = list[int](), ""
            else:
                reason = self._keep_prompt(job, rows[:known])
                tokens, text, reason = ([], "", reason) if reason else self._accept(job, rows[known:])
                self.scheduler.advance(chunk, tokens, drafts)
            if selected is not None and job.seen is not None:
                job.seen.append((start, selected[: request.computed - start]))  # none of a draft that was refused
            if reason is not None:
                self.scheduler.finish(request, reason)
                self._drop(request)
            updates.append(Update(job, tokens, text))
        return updates

    def _keep_scores(self, job: Job, rows: list[Choice], chunk: Chunk) -> str | None:
        """Keep a chunk's log-probabilities; why the job ends if it does."""
        start = chunk.request.computed
        job.scores[start : start + chunk.size] = [row.logprob for row in rows]
        bad = next((i for i, row in enumerate(rows) if row.token == NOT_FINITE), None)
        if bad is not None:
            return self.failures.note(job, start + bad)
        return "length" if chunk.is_last else None

    def _keep_prompt(self, job: Job, rows: list[Choice]) -> str | None:
        """Keep log-probabilities of the prompt; why the job ends if it does."""
        for row in rows:
            assert job.prompt_logprobs is not None
            if row.token == NOT_FINITE:
                return self.failures.note(job, len(job.prompt_logprobs))
            job.prompt_logprobs.append(row._replace(top=row.top[: job.params.prompt_logprobs]))
        return None

    def _accept(self, job: Job, rows: list[Choice]) -> tuple[list[int], str, str | None]:
        """The new tokens, their text, and why the job ends if it does.

        Row i was computed behind i draft tokens, so it counts while the drafts before it are what was sampled. The
        numbers that choose a token depend on its position alone: drafts change the speed, never the tokens.
        """
        request, params, tokens, text = job.request, job.params, list[int](), ""
        reason, end, ends = None, None, self.wanted.find_ends(params)
        for i, (token, logprob, top) in enumerate(rows):
            if i > 0 and request.draft[i - 1] != tokens[-1]:
                break
            place = len(request.tokens) + len(tokens)
            if token == NOT_FINITE:
                reason = self.failures.note(job, place - 1)
                break
            if token == NOTHING_LEFT or (job.match is not None and not job.match.accept(token)):
                reason = self.failures.note_banned(job, place - 1)
                break
            tokens.append(token)
            if params.logprobs is not None:
                job.logprobs.append(Choice(token, logprob, top[: params.logprobs]))
            if token in ends:
                reason, end = "stop", token
                job.stop_reason = token if token in params.stop_token_ids else None
                break
            is_searched = place - request.prompt_length >= params.min_tokens
            text += job.stream.push(token, is_searched) if job.stream else ""
            if job.stream and job.stream.is_stopped:
                reason, job.stop_reason = "stop", job.stream.stop
                break
            if job.match is not None and job.match.is_ended:
                reason = "stop"
                break
            if len(request.tokens) + len(tokens) >= request.max_length:
                reason = "length"
                break
        if reason is not None and job.stream:
            if end is not None and params.include_stop_str_in_output:
                text, end = text + job.stream.push(end), None
            text += job.stream.finish(end)
        job.text += text
        if tokens and len(request.tokens) > request.prompt_length:
            self._tally(job, tokens, reason)
        return tokens, text, reason

    def _tally(self, job: Job, tokens: list[int], reason: str | None) -> None:
        """Count a step's drafts. Those behind the end of an answer met no choice, and are not counted; the end itself
        may be one that was right, with no token behind it."""
        draft = job.request.draft
        accepted = next((i for i, (a, b) in enumerate(zip(draft, tokens, strict=False)) if a != b), None)
        if accepted is None:  # none was refused
            accepted = min(len(draft), len(tokens))
            judged = len(draft) if reason is None else accepted
        else:
            judged = len(draft)
        for tally in (job.tally, self.tally):
            tally.add(judged, accepted, len(tokens))
        self.pace.note_drafts(judged, accepted)


def open_text(tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int]) -> TextStream:
    """The text of an answer to `prompt`. Special tokens that it shows are text like any other."""
    stop, is_kept = params.stop, params.include_stop_str_in_output
    if params.skip_special_tokens:
        return TextStream(tokenizer.decode, stop, tokenizer.hidden, prompt, is_kept)
    return TextStream(tokenizer.decode_whole, stop, None, prompt, is_kept)


def is_steady(chunks: Sequence[Chunk], drafts: int) -> bool:
    """Whether a step is one token of each request with its drafts, for most of them as many as are made: such steps are
    timed. (Where requests come and go, hardly any step has all.)"""
    full = 0
    for request, size, ahead in chunks:
        if request.targets is not None or request.pending != 1:
            return False
        full += size == drafts + 1 and ahead == drafts
    return 4 * full >= 3 * len(chunks)
