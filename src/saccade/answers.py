"""What callers of `LLM` get: a `Completion`, or a `Stream` of `Piece`s. Next: llm.py, which makes them."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.errors import NumericsError
from saccade.job import Job
from saccade.pace import Tally
from saccade.sample import Choice

if TYPE_CHECKING:
    from saccade.llm import LLM


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    - `text`: without special tokens; None if the checkpoint has no tokenizer.
    - `token_ids`: with the end token, if one was chosen.
    - `finish_reason`: "stop" for an end token or a stop string; "length" if max_tokens, the context or the cache ended
      it; "error" where `error` says why it has none.
    - `logprobs`: a Choice for each token, if SamplingParams.logprobs asked for them: `token`, `logprob` and `top`, the
      likeliest as (token, logprob).
    - `selections`: if asked for by `capture_selection`, per layer i32 [positions, K]: what each position could see,
      padded with -1.
    - `drafts`: how drafts fared, and tokens a step; None without speculation.
    - `error`: why the answer ends where it does, its numbers being not finite (NumericsError); else None.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Choice] | None = None
    selections: list[Tensor] | None = None
    drafts: Tally | None = None
    error: str | None = None


@dataclass(frozen=True)
class Piece:
    """What a stream shows of one step.

    - `text`: may be empty, while a character or a stop string is incomplete.
    - `token_ids`: the tokens of this step.
    - `logprobs`: a Choice for each of them, if SamplingParams.logprobs asked for them.
    - `finish_reason`: None but in the last piece, where it is as in Completion.
    - `drafts`: as in Completion, in the last piece.
    """

    text: str
    token_ids: list[int]
    logprobs: list[Choice] | None = None
    finish_reason: str | None = None
    drafts: Tally | None = None


class Stream(Iterator[Piece]):
    """The pieces of one answer. Not a generator: closing one that was never started would not cancel the request.

    Raises NumericsError behind the last piece if logits or log-probabilities are not finite.
    """

    def __init__(self, llm: "LLM", job: Job) -> None:
        self._llm, self._job, self._shown = llm, job, 0
        self._inbox = llm.inboxes[job] = deque()
        self._is_told = False  # of the job's error

    def __next__(self) -> Piece:
        while not self._inbox:
            if self._job.finish_reason is not None:
                self.close()
                if self._job.error is not None and not self._is_told:
                    self._is_told = True
                    raise NumericsError(self._job.error)
                raise StopIteration
            self._llm.step()
        update, first = self._inbox.popleft(), self._shown
        self._shown += len(update.tokens)
        reason = None if self._inbox or self._job.error else self._job.finish_reason
        return Piece(
            text=update.text,
            token_ids=update.tokens,
            logprobs=None if self._job.params.logprobs is None else self._job.logprobs[first : self._shown],
            finish_reason=reason,
            drafts=self._job.tally if reason and self._llm.settings.speculate else None,
        )

    def close(self) -> None:
        """Cancel the request unless it has ended; what was not read is dropped."""
        self._llm.engine.cancel(self._job)
        self._llm.inboxes.pop(self._job, None)
        self._inbox.clear()

    def __del__(self) -> None:
        """Only leave a mark: garbage may be collected in the middle of a step, which counts on its jobs."""
        self._llm.engine.abandon(self._job)
        self._llm.inboxes.pop(self._job, None)
