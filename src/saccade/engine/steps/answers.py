"""What chosen tokens do to a request: its scores, its text, its end.

Next: engine.py, whose steps choose them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from saccade.engine.causes import Failures
from saccade.engine.pace import Pace, Tally
from saccade.engine.request import Job
from saccade.engine.sampling.choice import NOT_FINITE, NOTHING_LEFT, Choice
from saccade.engine.sampling.want import Wanted, count_prompt_rows
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.requests import Chunk, Request
from saccade.engine.steps.flight import Flight


class Update(NamedTuple):
    """What one step added to a job."""

    job: Job
    tokens: list[int]
    text: str


class BookedAnswers:
    """Of one engine."""

    def __init__(self, scheduler: Scheduler, wanted: Wanted, failures: Failures, pace: Pace, tally: Tally) -> None:
        self._scheduler, self._wanted, self._failures = scheduler, wanted, failures
        self._pace, self._total = pace, tally

    def commit(
        self,
        flight: Flight,
        rows: Sequence[Any],
        guesses: Sequence[list[int] | None],
        drop: Callable[[Request], None],
    ) -> list[Update]:
        """Book what a step did: scores, accepted tokens, new drafts, ends. `rows`, `guesses`: what `flight.read` gives;
        `drop` is told of each request that ends."""
        updates, first, is_plain = list[Update](), 0, flight.is_plain
        for place, (chunk, job, count, is_booked, drafts) in enumerate(
            zip(flight.chunks, flight.jobs, flight.counts, flight.is_booked, guesses, strict=False)
        ):  # guesses have rows of padding, which are left over
            begin, first, request = first, first + count, chunk.request
            if request.finish_reason is not None:  # while this was under way
                continue
            tokens, text, reason = list[int](), "", None
            if is_booked:
                if count:
                    token = rows[begin] if is_plain else rows[begin].token
                    tokens, text, reason = self._take(job, token)
                self._scheduler.settle(request, tokens[0] if tokens else None)
            else:
                told = [Choice(row, 0.0, ()) if is_plain else row for row in rows[begin:first]]
                tokens, text, reason = self._accept_chunk(job, chunk, told, drafts)
            if flight.capture is not None and job.seen is not None:
                flight.capture.note(place, job.seen, request.computed)  # nothing of a refused draft
            if reason is not None:
                self._scheduler.finish(request, reason)
                drop(request)
            updates.append(Update(job, tokens, text))
        return updates

    def _take(self, job: Job, token: int) -> tuple[list[int], str, str | None]:
        """As `accept`, of the one token of a job that wants nothing else. What most tokens need, and no more."""
        request, stream = job.request, job.stream
        place = len(request.tokens) - request.unknown
        if token < 0 or token in job.ends or place + 1 >= request.max_length:
            return self._accept(job, [Choice(token, 0.0, ())], place)
        if place > request.prompt_length:
            for tally in (job.tally, self._total):
                tally.steps += 1
                tally.tokens += 1
        if stream is None:
            return [token], "", None
        text = stream.push(token)
        job.text += text
        if stream.stop is None:
            return [token], text, None
        job.stop_reason = stream.stop
        return [token], text, "stop"

    def _accept_chunk(
        self, job: Job, chunk: Chunk, rows: list[Choice], drafts: Sequence[int] | None
    ) -> tuple[list[int], str, str | None]:
        """Of a chunk that was not booked: its new tokens, their text, and why the job ends if it does."""
        tokens, text, known = list[int](), "", count_prompt_rows(chunk, job)
        if job.request.targets is not None:
            reason = self._keep_scores(job, rows, chunk)
            self._scheduler.advance(chunk)
            return tokens, text, reason
        reason = self._keep_prompt(job, rows[:known])
        if reason is None:
            tokens, text, reason = self._accept(job, rows[known:], len(job.request.tokens))
        self._scheduler.advance(chunk, tokens, drafts)
        return tokens, text, reason

    def _keep_scores(self, job: Job, rows: list[Choice], chunk: Chunk) -> str | None:
        """Keep a chunk's log-probabilities; why the job ends if it does."""
        start, rows = chunk.request.computed, [row.cut(0) for row in rows]
        job.scores[start : start + chunk.size] = [row.logprob for row in rows]
        bad = next((i for i, row in enumerate(rows) if row.token == NOT_FINITE), None)
        if bad is not None:
            return self._failures.note(job, start + bad)
        return "length" if chunk.is_last else None

    def _keep_prompt(self, job: Job, rows: list[Choice]) -> str | None:
        """Keep log-probabilities of the prompt; why the job ends if it does."""
        for row in (each.cut(job.params.prompt_logprobs) for each in rows):
            assert job.prompt_logprobs is not None
            if row.token == NOT_FINITE:
                return self._failures.note(job, len(job.prompt_logprobs))
            job.prompt_logprobs.append(row)
        return None

    def _accept(self, job: Job, rows: list[Choice], first: int) -> tuple[list[int], str, str | None]:
        """The new tokens, of which one will be at place `first` of the request; their text, and why the job ends if it
        does.

        Row i was computed behind i draft tokens, so it counts while the drafts before it are what was sampled. The
        numbers that choose a token depend on its position alone: drafts change the speed, never the tokens.
        """
        request, params, tokens, text = job.request, job.params, list[int](), ""
        reason, end, ends = None, None, self._wanted.find_ends(params)
        for i, row in enumerate(each.cut(params.logprobs) for each in rows):
            token = row.token
            if i > 0 and request.draft[i - 1] != tokens[-1]:
                break
            place = first + len(tokens)
            if token == NOT_FINITE:
                reason = self._failures.note(job, place - 1)
                break
            if token == NOTHING_LEFT or (job.match is not None and not job.match.accept(token)):
                reason = self._failures.note_banned(job, place - 1)
                break
            tokens.append(token)
            if params.logprobs is not None:
                job.logprobs.append(row)
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
                is_long = place + 1 - request.prompt_length >= params.min_tokens
                reason = "stop" if is_long else self._failures.note_banned(job, place)
                break
            if first + len(tokens) >= request.max_length:
                reason = "length"
                break
        if reason is not None and job.stream:
            if end is not None and params.include_stop_str_in_output:
                text, end = text + job.stream.push(end), None
            text += job.stream.finish(end)
        job.text += text
        if tokens and first > request.prompt_length:
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
        for tally in (job.tally, self._total):
            tally.add(judged, accepted, len(tokens))
        self._pace.note_drafts(judged, accepted)
