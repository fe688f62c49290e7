"""What each row of logits of a step is wanted for, and what it is changed by before a token is chosen.

Row i of a request's last rows stands behind i of its guesses: it sees the penalties, the bans and the grammar's state
as they will be behind those. All of that is known on the host when a step begins. So drafts change no text, and nothing
waits for the device. Knows requests and rows, not how those are computed. Next: engine.py; change.py applies changes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.request import Job
from saccade.engine.sample import NO_LIMIT, Row, draw_uniform
from saccade.engine.sampling.change import Change, ChangeKind, Changes, count_numbers, fill_changes, find_change_kind
from saccade.engine.sampling.grammar import GrammarMatch, Grammars
from saccade.engine.sampling.seen import SeenTokens
from saccade.engine.scheduling.requests import Chunk, Request
from saccade.errors import RequestError
from saccade.text.tokenizer import Tokenizer

Jobs = Mapping[Request, Job]


def count_logit_rows(chunk: Chunk, job: Job) -> int:
    """Of how many of its last tokens a chunk wants logits: every one for scoring; those of the prompt whose following
    token has no log-probability yet, if they are wanted; else of the last and of drafts."""
    request = chunk.request
    if request.targets is not None:
        return chunk.size
    return count_prompt_rows(chunk, job) + (1 + len(request.draft) if chunk.is_last else 0)


def count_prompt_rows(chunk: Chunk, job: Job) -> int:
    """How many of a chunk's rows of logits are for log-probabilities of the prompt. They come first."""
    request = chunk.request
    if job.prompt_logprobs is None:
        return 0
    first = max(request.computed, len(job.prompt_logprobs))  # those before are known, from before a preemption
    return max(0, min(request.computed + chunk.size, request.prompt_length - 1) - first)


def count_logprobs(chunk: Chunk, job: Job) -> int:
    """How many likeliest tokens a chunk's rows tell; -1 if not even the chosen one's log-probability."""
    if chunk.request.targets is not None:
        return 0
    asked = -1 if job.params.logprobs is None else job.params.logprobs
    if count_prompt_rows(chunk, job) and job.params.prompt_logprobs is not None:
        asked = max(asked, job.params.prompt_logprobs)
    return asked


def want_rows(chunk: Chunk, job: Job) -> list[Row]:
    """What the chunk's rows of logits are for: the targets it is scored by, or its next token and its drafts'."""
    request, params = chunk.request, job.params
    if request.targets is not None:
        return [Row(target=t) for t in request.targets[request.computed : request.computed + chunk.size]]
    known = count_prompt_rows(chunk, job)
    end = min(request.computed + chunk.size, request.prompt_length - 1)
    targets = [Row(target=token) for token in request.tokens[end + 1 - known : end + 1]]
    temperature, top_k, top_p, min_p = list_options(params)
    place = len(request.tokens)
    return targets + [
        Row(temperature, int(top_k), top_p, min_p, draw_uniform(job.seed, place + i))
        for i in range(count_logit_rows(chunk, job) - known)
    ]


def list_options(params: SamplingParams) -> tuple[float, float, float, float]:
    """How a request's tokens are chosen, as a `Row` begins. The numbers are f64: larger ones of top_k limit nothing."""
    return params.temperature or 0.0, min(params.top_k or 0, NO_LIMIT), params.top_p or 1.0, params.min_p or 0.0


class Wanted:
    """What the requests of one engine ask of the choice of tokens, and the state that it takes."""

    def __init__(
        self,
        requests: int,
        vocab_size: int,
        device: torch.device | str,
        defaults: Defaults,
        tokenizer: Tokenizer | None,
    ) -> None:
        """`requests`: of a step, at most."""
        self._vocab_size, self._device, self._ends = vocab_size, device, defaults.eos_token_ids
        self.seen = SeenTokens(requests, vocab_size, device)
        self.grammars = Grammars(tokenizer, vocab_size, self._ends)

    def start(self, params: SamplingParams) -> GrammarMatch | None:
        """What follows the answer through its grammar; None if it has none. RequestError for what cannot be served."""
        if params.n != 1:
            raise RequestError(f"n: expected 1 of what has one answer, found {params.n}; `generate` gives several")
        params.check_tokens(self._vocab_size)
        return None if params.constraint is None else self.grammars.start(params.constraint)

    def find_ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end an answer; a grammar ends at the checkpoint's in any case."""
        is_open = params.ignore_eos and params.constraint is None
        return (*params.stop_token_ids, *(() if is_open else self._ends))

    def list_changes(self, chunks: Sequence[Chunk], jobs: Jobs) -> list[Change]:
        """One for each row of the step's chunks, in their order; none if nothing is changed."""
        asking = [chunk for chunk in chunks if chunk.is_last and jobs[chunk.request].params.changes_logits]
        if not asking:
            return []
        fined = [chunk.request for chunk in asking if jobs[chunk.request].params.penalties != Change().penalties]
        seen = dict(zip(fined, self.seen.follow(fined), strict=True)) if fined else {}
        changes = list[Change]()
        for chunk in chunks:
            job, rows = jobs[chunk.request], count_logit_rows(chunk, jobs[chunk.request])
            if chunk not in asking or chunk.request.targets is not None:
                changes += [Change()] * rows
                continue
            changes += [Change()] * count_prompt_rows(chunk, job)
            changes += self._list_answer(job, seen.get(chunk.request, 0))
        return changes

    def take_changes(self, chunks: Sequence[Chunk], jobs: Jobs, length: int) -> Changes | None:
        """The same on the device, for `length` rows; None if nothing is changed. Not waited for."""
        changes = self.list_changes(chunks, jobs)
        kind = find_change_kind(changes)
        if kind is None:
            return None
        flat = torch.zeros(count_numbers(kind, length), dtype=torch.float64)
        fill_changes(changes, kind, flat)
        if torch.device(self._device).type == "cuda":
            flat = flat.pin_memory().to(self._device, non_blocking=True)
        return Changes.take(flat, kind, self.find_table(kind))

    def find_table(self, kind: ChangeKind | None) -> Tensor | None:
        """Of seen tokens, where the changes look there."""
        return self.seen.table if kind is not None and kind.ahead >= 0 else None

    def cut_guesses(self, job: Job) -> None:
        """Drop guesses that the grammar does not allow: they would take rows and could not be right."""
        if job.match is not None:
            del job.request.draft[job.match.count_possible(job.request.draft) :]

    def forget(self, request: Request) -> None:
        """It has ended."""
        self.seen.forget(request)

    def _list_answer(self, job: Job, seen: int) -> list[Change]:
        """Of the next token and those behind its guesses."""
        request, params = job.request, job.params
        guesses, done = request.draft, len(request.tokens) - request.prompt_length
        rows = range(len(guesses) + 1)
        masks = job.match.find_masks(guesses) if job.match is not None else [None for _ in rows]
        ends = self.find_ends(params) if done < params.min_tokens else ()
        return [
            Change(
                seen=seen,
                penalties=params.penalties,
                ahead=guesses[:i] if seen else (),
                biases=params.biases,
                banned=ends if done + i < params.min_tokens else (),
                mask=masks[i],
            )
            for i in rows
        ]
