"""Which tokens of which requests run in the next step, and on which cache pages.

Requests wait in a queue and run in order of arrival; `running` followed by `waiting` is that order at all times, so the
oldest request is held up by a younger one for a step at most (step_kinds.py) and every request ends. Full pages are
kept after use: whoever begins with the same tokens finds them. Knows no tensor and no text: pages are numbers, a step
is a list of `Chunk`s. Next: scheduling/ has pages, keys and shares, buffers.py turns chunks into tensors, engine.py
calls schedule and advance.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice

from saccade.engine.params import SamplingParams
from saccade.engine.scheduling.lengths import Limits
from saccade.engine.scheduling.page_pool import Pages, count_pages
from saccade.engine.scheduling.prefix_cache import PrefixCache, PrefixTally
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.engine.scheduling.requests import UNKNOWN, Chunk, Request
from saccade.engine.scheduling.step_kinds import StepTurns, find_border
from saccade.engine.scheduling.step_shares import limit_step, share_step
from saccade.kernels import PAGE


class Scheduler:
    """Continuous batching with chunked prefill."""

    def __init__(
        self,
        pages: int,
        max_batch_tokens: int,
        max_requests: int,
        max_length: int,
        prefix: PrefixKeys | None = None,
        max_mixed_tokens: int | None = None,
        rounds: bool = False,
    ) -> None:
        """`pages` counts page 0. `max_length` is the model's context in tokens, prompt and output together. `prefix`
        names pages, which are kept and found again; None: they are not. `max_mixed_tokens`: tokens of a step in which
        requests decode beside prompts; None: as many as of any step. `rounds`: whether steps of long prompts round, and
        have no other tokens."""
        mixed = max_batch_tokens if max_mixed_tokens is None else max_mixed_tokens
        if pages < 2 or max_batch_tokens < 1 or mixed < 1 or max_requests < 1 or max_length < 1:
            raise ValueError("the scheduler needs two pages, a token and a request at least")
        self.pages = Pages(pages)
        self.max_batch_tokens, self.max_mixed_tokens = max_batch_tokens, mixed
        self.max_requests = max_requests
        self._limits = Limits.of(max_length, pages)
        self.max_length, self.capacity = self._limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.moved: set[Request] = set()  # whose pages or slot have changed; for whoever mirrors them, to be emptied
        self._prefix = None if prefix is None else PrefixCache(prefix, self.pages)
        self._next_id = 0
        self._slots = list(range(max_requests, 0, -1))  # that are free
        self.rounds, self._turns = rounds, StepTurns() if rounds else None

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def prefix_tally(self) -> PrefixTally | None:
        """None without a prefix cache."""
        return None if self._prefix is None else self._prefix.read_tally()

    def add(self, tokens: Sequence[int], params: SamplingParams | None = None, is_whole: bool = False) -> Request:
        """Queue a prompt. `is_whole`: something is wanted of each of its rows, so that none may be found instead of
        computed. Raises RequestError at once if it could never run."""
        params = params or SamplingParams()
        length = self._limits.find_length(len(tokens), params.max_tokens)
        return self._queue(list(tokens), length, params, None, is_whole)

    def add_scoring(self, tokens: Sequence[int]) -> Request:
        """Queue n tokens, two at least, to be scored: the first n - 1 run, each with the following one as its target.

        Raises RequestError at once if they could never run.
        """
        length = len(tokens)
        self._limits.check_scored(length)
        return self._queue(list(tokens[:-1]), length, SamplingParams(max_tokens=1), list(tokens[1:]), True)

    def _queue(
        self, tokens: list[int], length: int, params: SamplingParams, targets: list[int] | None, is_whole: bool
    ) -> Request:
        request = Request(self._next_id, tokens, len(tokens), length, params, targets, is_whole=is_whole)
        self._next_id += 1
        self.waiting.append(request)
        return request

    def schedule(self, guesses: int = 0) -> list[Chunk]:
        """The next step: as many of the waiting requests as fit begin to run, all share its tokens (step_shares.py);
        after that, drafts are verified and up to `guesses` new ones made behind each request with what is left.

        A guess is worth nobody's page and nobody's place in a step: pages that only guesses lie in are given back
        first, and what is known, of whoever, takes its own before any guess does.
        """
        chunks = self._fill_step(guesses)
        if not chunks and self.running:  # all of its kind gave way: the oldest of all is of the other one
            chunks = self._fill_step(guesses)
        return chunks

    def _fill_step(self, guesses: int) -> list[Chunk]:
        drafts, running, wants = 0, self.running, list[int]()
        for request in running:
            if request.draft:
                # The last token is never run, so a draft can fill all but one of the tokens still to come.
                request.draft = request.draft[: max(0, request.max_length - len(request.tokens) - 1)]
                drafts += len(request.draft)
            length = len(request.tokens)
            if len(request.pages) * PAGE >= length + PAGE:
                self._give_back(request)
            if length - request.computed > 1:  # a decode finds nothing: its one token has to run
                self._find(request)
            wants.append(0 if length >= request.max_length else request.ready)
        if self.waiting:
            self._admit()
            wants += [request.ready for request in running[len(wants) :]]
        rounds, decodes = False, wants.count(1)
        if self._turns is not None:
            rounds, wants, decodes = self._turns.take(wants, [request.rounds for request in running])
        most, prompts = limit_step(wants, decodes, self.max_batch_tokens, self.max_mixed_tokens)
        if rounds:
            most, drafts = prompts, 0
        # Half of what all decodes leave of the step: prefill goes on beside them, and so do they.
        kept = min(drafts, max(0, most - decodes) // 2) if drafts else 0
        keys: dict[int, bytes | None] = {}
        if self._prefix is not None:
            keys = {i: self._prefix.find_key(running[i]) for i, want in enumerate(wants) if want > 1}
        chunks: list[Chunk] = []
        for place, size in enumerate(share_step(wants, most - kept, keys, prompts - kept)):
            if place >= len(running):
                break  # it lost its tail to preemption meanwhile
            request = running[place]
            end = request.computed + size
            if size and (end <= len(request.pages) * PAGE or self._grow(request, end)):
                chunks.append(Chunk(request, size))
        if not (guesses or drafts):
            return chunks
        return self._add_guesses(chunks, most - sum(chunk.size for chunk in chunks), guesses)

    def has_decodes(self, count: int) -> bool:
        """Whether at least `count` of the running requests decode in the next step, where none gives way to others. A
        token that is being chosen counts as known."""
        if len(self.running) < count:
            return False
        decodes = (request for request in self.running if request.pending == 1 and not request.is_full)
        return sum(1 for _ in islice(decodes, count)) == count

    def _admit(self) -> None:
        """Let waiting requests run while there are pages for all that is known of them. They take them as they go."""
        lacking = sum(max(0, count_pages(len(r.tokens)) - len(r.pages)) for r in self.running)
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting[0]
            self._find(request)
            lacking += count_pages(len(request.tokens)) - len(request.pages)
            if lacking > self.pages.free:
                self._forget(request)
                break  # no younger request may overtake: it could starve this one
            self.running.append(self.waiting.popleft())
            request.slot = self._slots.pop()
            request.rounded = 0 if self._turns is None else find_border(request.prompt_length, request.computed)
            self.moved.add(request)

    def _find(self, request: Request) -> None:
        if self._prefix is not None:
            self._prefix.find(request)
            self.moved.add(request)

    def _add_guesses(self, chunks: list[Chunk], left: int, guesses: int) -> list[Chunk]:
        """The chunks with as many of their drafts as `left` tokens and the free pages allow, and then with room for
        `guesses` new ones each."""
        for i, chunk in enumerate(chunks):
            request = chunk.request
            end = request.computed + chunk.size
            most = min(left, self._count_rows(request) - end) if chunk.is_last else 0
            request.draft = request.draft[: max(0, most)]
            self._own(request, end + len(request.draft))
            chunks[i] = Chunk(request, chunk.size + len(request.draft))
            left -= len(request.draft)
        for i, chunk in enumerate(chunks):
            request = chunk.request
            if guesses and chunk.is_last and request.targets is None:
                end = request.computed + chunk.size
                # Behind the last row comes a token, then the first guess, which leaves no row: only the next ones do.
                most = min(guesses, request.max_length - len(request.tokens) - 2, self._count_rows(request) - end + 1)
                ahead = max(0, most)
                self._own(request, min(end + ahead - 1, request.max_length))
                chunks[i] = chunk._replace(ahead=ahead)
        return chunks

    def _count_rows(self, request: Request) -> int:
        """Rows of the cache that the request could own without taking a page from anybody."""
        return (len(request.pages) + self.pages.free) * PAGE

    def _own(self, request: Request, length: int) -> None:
        request.pages += self.pages.take(max(0, count_pages(length) - len(request.pages)))
        self.moved.add(request)

    def _give_back(self, request: Request) -> None:
        """Let go of pages beyond the known tokens: whatever lies there are guesses' rows, which are written anew."""
        needed = count_pages(len(request.tokens))
        self.pages.release(request.pages[needed:])
        del request.pages[needed:]

    def _grow(self, request: Request, length: int) -> bool:
        """Own pages for `length` tokens, at the cost of younger requests; False if `request` had to give way."""
        needed = count_pages(length) - len(request.pages)
        while needed > self.pages.free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.pages += self.pages.take(max(0, needed))
        self.moved.add(request)
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue. Its tokens stay known and are computed again, as far as its pages are taken by
        others meanwhile. So are its states, from zero: nothing is saved."""
        self.running.remove(request)
        self._forget(request)
        self.waiting.appendleft(request)
        request.preemptions += 1
        self.preemptions += 1

    def _forget(self, request: Request) -> None:
        self.pages.release(request.pages)
        if request.slot:
            self._slots.append(request.slot)
        request.slot = request.settled = 0
        request.pages, request.computed, request.followed, request.draft = [], 0, 0, []

    def advance(self, chunk: Chunk, tokens: Sequence[int] = (), guesses: Sequence[int] | None = None) -> None:
        """The chunk went through the model and `tokens` were chosen: accepted drafts, then one more. `guesses`: what
        the drafting layer, which ran over the chunk too, takes for the next ones; None if it did not run.

        Rows of refused drafts lie beyond `computed` and are overwritten by whatever comes next.
        """
        request = chunk.request
        if self._prefix is not None:
            self._prefix.count(request)
        is_followed = guesses is not None and request.followed >= request.computed
        request.computed = min(request.computed + chunk.size, len(request.tokens) + max(0, len(tokens) - 1))
        request.tokens.extend(tokens)
        request.draft = list(guesses or ())[: chunk.ahead]
        if is_followed:
            request.followed = request.computed
        request.reached = max(request.reached, request.computed)
        if self._prefix is not None:
            self._prefix.keep(request)

    def book(self, chunk: Chunk, row: int) -> None:
        """The chunk is on its way through the model, without drafts; `row`: of the step's choices, which will be its
        next token if it reaches the last known one. Until `settle` there is a place for that token. So the step after
        this one can be laid out before this one has ended."""
        request, size, _ = chunk
        if self._prefix is not None and (request.reached != request.computed or not request.reached):
            self._prefix.count(request)
        request.computed += size
        if request.reached < request.computed:
            request.reached = request.computed
        if request.computed == len(request.tokens):
            request.tokens.append(UNKNOWN)
            request.unknown += 1
            request.row = row

    def settle(self, request: Request, token: int | None) -> None:
        """The step of a booked chunk has ended, and chose `token` if the chunk reached the last known one."""
        if token is not None:
            request.tokens[-request.unknown] = token
            request.unknown -= 1
        if self._prefix is not None and request.computed >= (request.settled + 1) * PAGE:
            self._prefix.keep(request)

    def catch_up(self) -> None:
        """Roll back to where the drafting layer has seen everything: its rows for tokens that were generated without
        it are made by running those again, in a chunk. Without them it would look at what other requests left."""
        for request in self.running:
            if request.targets is None:
                request.computed = min(request.computed, request.followed)

    def finish(self, request: Request, reason: str) -> None:
        """End a request, wherever it is. Ending it twice does nothing: a cancellation may cross its end."""
        if request.finish_reason is not None:
            return
        if request.unknown:  # of steps under way, whose choices nobody waits for any more
            del request.tokens[-request.unknown :]
            request.unknown = 0
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if reason == "error":  # its rows may be what was wrong
            self.pages.forget(request.pages)
        self._forget(request)
        request.finish_reason = reason

    def forget_prefixes(self) -> None:
        """Find no page any more that was computed until now: the weights change. No request may be running."""
        if self.running:
            raise ValueError(f"{len(self.running)} requests run on the old weights")
        self.pages.forget()

    def cancel(self, request: Request) -> None:
        self.finish(request, "cancelled")
