"""The engine: requests in, tokens out, one `step` at a time.

schedule -> batch -> forward -> sample, with drafts behind it if there are any -> commit. This is the only place that
sees both requests and tensors, and the only wait in a step is reading the chosen tokens back. It knows no files, no
prompts in text, no threads: of `add`, `step` and `cancel` one runs at a time (shared.py). Next: scheduler.py decides,
buffers.py lays out, sample.py chooses, speculate.py drafts.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch

from saccade.base.memory import naming_memory
from saccade.base.values import show
from saccade.engine.buffers import Buffers, StepInputs, StepLayout, UnknownTokens
from saccade.engine.causes import Causes, Failures
from saccade.engine.model import Chooser, Runner
from saccade.engine.pace import Pace, Tally
from saccade.engine.pages import clear_states
from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.request import Job
from saccade.engine.sample import GREEDY, ReadBack, Row, Spec, draw_uniform, find_stream
from saccade.engine.sampling.change import Change, find_change_kind
from saccade.engine.sampling.want import Wanted, count_logit_rows, list_options
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.page_pool import count_pages
from saccade.engine.scheduling.requests import Chunk, Request
from saccade.engine.speculate import Ask, StepKind, fill_columns
from saccade.engine.speculate import RunStep as RunDrafts
from saccade.engine.steps.ahead import LAUNCH_AHEAD
from saccade.engine.steps.answers import BookedAnswers, Update
from saccade.engine.steps.choose import StepWants, find_draw, run_and_choose, want_each, want_tokens
from saccade.engine.steps.flight import Flight
from saccade.engine.steps.selections import HeldParts, StepPiece, StepSelections
from saccade.engine.steps.slot_table import SlotTable
from saccade.errors import RequestError
from saccade.ops.device import on
from saccade.ops.step import Batch, Cache
from saccade.text.detokenize import TextStream
from saccade.text.tokenizer import NO_TOKENIZER, Tokenizer, require_tokenizer


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
        launch_ahead: str = "off",
    ) -> None:
        """`cache` has `scheduler.pages.count` pages. `defaults` completes every request's params. Steps of up to
        `small` tokens have few shapes, for a model that keeps a CUDA graph of each. `speculate`: drafts of a step, or
        "auto"; made by `run_drafts`, which the cache has a pool for. `causes` looks into the model when numbers are not
        finite. `launch_ahead`, of LAUNCH_AHEAD: whether a step is launched before the one in front of it has been
        waited for, where no request needs more of that than its tokens; not with drafts, nor with states."""
        self.model, self.cache, self.scheduler = model, cache, scheduler
        self._choose = model.choose if isinstance(model, Chooser) else partial(run_and_choose, model)
        self._draw_tokens = find_draw(model.ops)
        self.vocab_size, self.device = vocab_size, device
        self.defaults, self.tokenizer = defaults or Defaults(), tokenizer
        longest = min(scheduler.max_length, scheduler.capacity)
        buffers = (scheduler.max_batch_tokens, scheduler.max_requests, count_pages(longest))
        self.buffers = Buffers(device, *buffers, small, bool(cache.states))
        self._run_drafts = run_drafts if speculate else None
        self.speculate = speculate if run_drafts else 0
        self.pace, self.tally = Pace(), Tally()  # of all requests
        self._flights: deque[Flight] = deque()  # steps under way; between two calls of `step` one launched ahead
        is_waited = bool(cache.states) or self._run_drafts is not None
        self._least_ahead = None if is_waited else LAUNCH_AHEAD[launch_ahead]  # decodes of a step
        self._special, self._capturing = 0, 0  # jobs that are not plain; that keep what is selected
        self._captured = list[StepSelections]()  # of steps whose tokens are known; not handed over yet
        self._table = SlotTable(scheduler.max_requests, self.buffers.widest)
        self.jobs: dict[Request, Job] = {}  # those that have not finished
        self._in_step: list[Request] = []  # those of the last step
        self.wanted = Wanted(scheduler.max_requests, vocab_size, device, self.defaults, tokenizer)
        self.causes, self.failures = causes, Failures(causes, scheduler, self.buffers, cache, device)
        self._answers = BookedAnswers(scheduler, self.wanted, self.failures, self.pace, self.tally)
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
        job.ends = frozenset(self.wanted.find_ends(job.params))
        self._special += not job.is_plain
        self._capturing += job.seen is not None
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
        job = self.jobs.pop(request, None)
        if job is not None:
            self._special -= not job.is_plain
            self._capturing -= job.seen is not None
        self.wanted.forget(request)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one batch; what it added to which job. [] only if there is nothing to do.

        Where many decode, the batch after it is laid out and launched before this one is waited for. What that one
        computes for requests that end here is for nothing, and is thrown away.
        """
        start, flights = time.perf_counter(), self._flights
        while flights and not flights[0].is_awaited:
            flights.popleft()
        drafts = 0 if flights and self._run_drafts is not None else self._choose_drafts()
        if not flights:
            self._launch(drafts)
        if len(flights) == 1 and self._may_launch_ahead():
            self._launch(0)
        under_way = tuple(flights)
        try:
            with on(self.device):
                self._hand_over()  # while the device computes
            if not flights:
                return []
            with on(self.device), self.interruptible():
                rows, guesses = flights[0].read()
            flight = flights.popleft()
            updates = self._answers.commit(flight, rows, guesses, self._drop)
        except Exception:  # what is under way will not come, or follows tokens that were not booked
            self._in_step = [chunk.request for each in under_way for chunk in each.chunks]
            flights.clear()
            raise
        if flight.capture is not None:
            self._captured.append(flight.capture)
            if any(update.job.seen is not None and update.job.finish_reason for update in updates):
                self._hand_over()
        if flight.is_timed:
            self.pace.note_time(len(flight.chunks), flight.drafts, time.perf_counter() - start)
        return updates

    def _may_launch_ahead(self) -> bool:
        """Whether the next step may be launched now. Asked on each rank, of what is equal on all."""
        least = self._least_ahead
        return least is not None and not self._special and self.scheduler.has_decodes(least)

    def settle(self) -> None:
        """Wait for what is under way for nobody. Afterwards the device computes nothing for this engine if no job is
        left."""
        while self._flights and not self._flights[0].is_awaited:
            with on(self.device):
                self._flights.popleft().read()

    def _launch(self, drafts: int) -> None:
        """Have the next batch computed, if there is one."""
        self._in_step = []
        chunks = self.scheduler.schedule(drafts)
        self._in_step = [chunk.request for chunk in chunks]
        if not chunks:
            return
        is_timed = self.speculate == "auto" and is_steady(chunks, drafts)
        memory = naming_memory("a step's activations", "smaller steps: fewer max_batch_tokens")
        jobs = [self.jobs[chunk.request] for chunk in chunks]
        # Without drafts the layer still follows prompts: to make up for one later would be to run it again.
        is_followed = self._run_drafts is not None and any(
            c.request.targets is None and (drafts or c.request.pending > 1) for c in chunks
        )
        with on(self.device), memory, self.interruptible():
            try:
                counts = self._count_rows(chunks, jobs, drafts)
                is_usual = not is_followed and (not self._special or all(job.is_plain for job in jobs))
                wants = want_tokens(chunks, jobs, counts, self._table) if is_usual else want_each(chunks, jobs)
                inputs = self._lay_out(chunks, counts, wants)
                capture = self._open_capture(inputs.batch, chunks)
                if is_followed:
                    reading = self._draft(inputs, chunks, wants, drafts, capture)
                else:
                    reading = self._run(inputs, chunks, wants, capture)
                capture = self._send_selections(capture, chunks)
            except BaseException:
                self._rewind(chunks)
                raise
        is_booked = [job.is_plain and not (is_followed or job.request.draft) for job in jobs]
        row = 0
        for chunk, count, booked in zip(chunks, counts, is_booked, strict=True):
            if booked:
                self.scheduler.book(chunk, row)
            row += count
        made = drafts if is_followed and any(chunk.ahead for chunk in chunks) else 0
        self._flights.append(
            Flight(chunks, jobs, counts, is_booked, reading, capture, is_followed, made, drafts, is_timed)
        )

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

    def _count_rows(self, chunks: list[Chunk], jobs: list[Job], drafts: int) -> list[int]:
        """Rows of logits of each chunk."""
        if drafts or self._special or any(chunk.request.draft for chunk in chunks):
            return [count_logit_rows(chunk, job) for chunk, job in zip(chunks, jobs, strict=True)]
        return [int(size >= len(request.tokens) - request.computed) for request, size, _ in chunks]

    def _lay_out(self, chunks: list[Chunk], counts: list[int], wants: StepWants) -> StepInputs:
        """The step on the device. `counts`: rows of logits of each chunk."""
        tokens, starts, lengths, slots = list[int](), list[int](), list[int](), list[int]()
        rows, places, reach = list[int](), list[int](), 0
        for chunk in chunks:
            request, size, ahead = chunk
            start, known = request.computed, request.tokens
            if request.unknown:  # the step before chooses it
                rows.append(request.row)
                places.append(len(tokens))
                tokens.append(0)
            elif size == 1:
                tokens.append(known[start])
            else:
                tokens += known[start : start + size]
                tokens += request.draft[: start + size - len(known)] if start + size > len(known) else ()
            starts.append(start)
            lengths.append(size)
            slots.append(request.slot)
            end = start + size + (ahead - 1 if ahead > 1 else 0)
            reach = end if end > reach else reach
        self._note_moved()
        clear_states(self.cache, [chunk.request.slot for chunk in chunks if chunk.request.computed == 0])
        before = self._flights[-1].reading if rows else None
        follow = None if before is None else UnknownTokens(before.tokens, rows, places)
        tables = lambda width: self._table.pages[slots, :width]  # noqa: E731
        rounds = chunks[0].request.rounds
        step = StepLayout(tokens, starts, counts, slots, lengths, reach, tables, wants.columns, rounds)
        return self.buffers.lay_out(step, follow)

    def _note_moved(self) -> None:
        """Keep pages and options of requests that have other pages or another slot than in the step before."""
        for request in self.scheduler.moved:
            job = self.jobs.get(request)
            if job is not None and request.slot:
                self._table.keep(request.slot, request.pages, list_options(job.params), find_stream(job.seed))
        self.scheduler.moved.clear()

    def _rewind(self, chunks: list[Chunk]) -> None:
        """After a step that did not end. Cache rows are written again by the next one; states may have gone on, some
        layers' and not others', so that their requests begin anew."""
        if self.cache.states:
            for chunk in chunks:
                chunk.request.computed = 0

    def _draft(
        self, inputs: StepInputs, chunks: list[Chunk], wants: StepWants, drafts: int, capture: StepSelections | None
    ) -> ReadBack | None:
        """A step that verifies drafts, makes new ones, or has the drafting layer follow prompts."""
        assert self._run_drafts is not None
        made = drafts if any(chunk.ahead for chunk in chunks) else 0
        changes = iter(self.wanted.list_changes(chunks, self.jobs))
        asks = [self._ask(chunk, rows, made, changes) for chunk, rows in zip(chunks, wants.rows, strict=True)]
        change = find_change_kind([change for ask in asks for change in ask.changes])
        kind = StepKind(made, wants.kind or GREEDY, change)
        flat, seen = fill_columns(asks, inputs.batch, made), self.wanted.find_table(change)
        packed = self._run_drafts(inputs, self.cache, flat, kind, capture, seen)
        return ReadBack(packed) if wants.kind is not None else None

    def _ask(self, chunk: Chunk, rows: list[Row], drafts: int, changes: Iterator[Change]) -> Ask:
        """`changes`: those of all rows that are left."""
        request, job = chunk.request, self.jobs[chunk.request]
        start, place = request.computed + 1, len(request.tokens)
        following = (request.tokens[start : start + chunk.size] + request.draft)[: chunk.size]
        following += [0] * (chunk.size - len(following))
        is_random = chunk.ahead > 0 and bool(job.params.temperature)
        uniforms = [draw_uniform(job.seed, place + i) for i in range(2 * drafts + 1)] if is_random else []
        return Ask(rows, request.draft, following, uniforms, list(islice(changes, len(rows))))

    def _open_capture(self, batch: Batch, chunks: list[Chunk]) -> StepSelections | None:
        """What takes the selections of a step, if anybody in it wants them."""
        is_wanted = self._capturing and any(self.jobs[chunk.request].seen is not None for chunk in chunks)
        return StepSelections(batch) if is_wanted else None

    def _send_selections(self, capture: StepSelections | None, chunks: list[Chunk]) -> StepSelections | None:
        """Begin their copy to the host, behind that of the chosen tokens; what is to be handed over, if anything."""
        if capture is not None:
            requests = [chunk.request for chunk in chunks]
            is_wanted = [self.jobs[request].seen is not None for request in requests]
            pieces = zip(requests, chunks, is_wanted, strict=True)
            capture.send([StepPiece(request.computed, chunk.size, wanted) for request, chunk, wanted in pieces])
        return capture

    def _hand_over(self) -> None:
        """What steps selected, to those who asked for it."""
        while self._captured:
            self._captured.pop(0).hand_over()

    def _run(
        self, inputs: StepInputs, chunks: list[Chunk], wants: StepWants, capture: StepSelections | None
    ) -> ReadBack | None:
        """A step without drafts, and a choice for every row whose logits are wanted, in the order of the chunks."""
        batch = inputs.batch
        if wants.kind is None:  # prefill only: the head, which is 2 GB of weights in DeepSeek-V3.2, is not even touched
            self.model.forward(batch, self.cache, capture)
            return None
        spec = Spec(inputs.wants, wants.kind, self._draw_tokens)
        if not wants.changes_logits:
            return ReadBack(self._choose(batch, self.cache, spec, capture))
        find = partial(self.wanted.take_changes, chunks, self.jobs, len(batch.logit_rows))
        return ReadBack(run_and_choose(self.model, batch, self.cache, spec, capture, find))


def open_text(tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int]) -> TextStream:
    """The text of an answer to `prompt`. Special tokens that it shows are text like any other."""
    stop, is_kept = params.stop, params.include_stop_str_in_output
    if params.skip_special_tokens:
        return TextStream(tokenizer.decode, stop, tokenizer.hidden, prompt, is_kept, tokenizer.pieces[False])
    return TextStream(tokenizer.decode_whole, stop, None, prompt, is_kept, tokenizer.pieces[True])


def is_steady(chunks: Sequence[Chunk], drafts: int) -> bool:
    """Whether a step is one token of each request with its drafts, for most of them as many as are made: such steps are
    timed. (Where requests come and go, hardly any step has all.)"""
    full = 0
    for request, size, ahead in chunks:
        if request.targets is not None or request.pending != 1:
            return False
        full += size == drafts + 1 and ahead == drafts
    return 4 * full >= 3 * len(chunks)
