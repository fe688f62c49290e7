"""What callers of `LLM` get: a `Completion`, or a `Stream` of `Piece`s. Next: llm.py, which makes them."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from saccade.engine.pace import Tally
from saccade.engine.request import Job
from saccade.engine.sampling.choice import Choice
from saccade.engine.shared import Delivery, SharedEngine


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
    - `cached_tokens`: of the prompt, found in the prefix cache instead of computed.
    - `error`: why the answer ends where it does, its numbers being not finite (NumericsError) or no token being left
      to choose (NoAnswerError); else None.
    - `stop_reason`: the stop string, or the token of `stop_token_ids`, that ended it; None for an end token.
    - `prompt_logprobs`: a Choice for each token of the prompt but the first, if SamplingParams.prompt_logprobs asked.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Choice] | None = None
    selections: list[Tensor] | None = None
    drafts: Tally | None = None
    error: str | None = None
    cached_tokens: int = 0
    stop_reason: int | str | None = None
    prompt_logprobs: list[Choice] | None = None


@dataclass(frozen=True)
class Piece:
    """What a stream shows of one step.

    - `text`: may be empty, while a character or a stop string is incomplete.
    - `token_ids`: the tokens of this step.
    - `logprobs`: a Choice for each of them, if SamplingParams.logprobs asked for them.
    - `finish_reason`: None but in the last piece, where it is as in Completion.
    - `cached_tokens`: as in Completion, in every piece.
    - `drafts`, `stop_reason`: as in Completion, in the last piece.
    - `prompt_logprobs`: as in Completion, in the first piece.
    """

    text: str
    token_ids: list[int]
    logprobs: list[Choice] | None = None
    finish_reason: str | None = None
    drafts: Tally | None = None
    cached_tokens: int = 0
    stop_reason: int | str | None = None
    prompt_logprobs: list[Choice] | None = None


class Stream(Iterator[Piece]):
    """The pieces of one answer. Not a generator: closing one that was never started would not cancel the request.

    Any thread may read it, close it or let go of it. Of two that read at once, each gets every other piece. Behind the
    last piece it raises NumericsError if logits or log-probabilities are not finite, NoAnswerError if no token is left.
    """

    def __init__(self, shared: SharedEngine, job: Job, inbox: deque[Delivery]) -> None:
        self._shared, self._job, self._inbox, self._shown = shared, job, inbox, 0
        self._reading, self._is_closed = Lock(), False
        self._is_told = False  # of the job's error

    def __next__(self) -> Piece:
        with self._reading:
            delivery = None if self._is_closed else self._shared.take(self._job, self._inbox)
            if delivery is None or self._is_closed:
                self.close()
                if self._job.error is not None and not self._is_told:
                    self._is_told = True
                    raise self._job.error_type(self._job.error)
                raise StopIteration
            (_, tokens, text), reason = delivery
            first, self._shown = self._shown, self._shown + len(tokens)
        return Piece(
            text=text,
            token_ids=tokens,
            logprobs=None if self._job.params.logprobs is None else self._job.logprobs[first : first + len(tokens)],
            finish_reason=reason,
            drafts=self._job.tally if reason and self._shared.engine.speculate else None,
            cached_tokens=self._job.request.cached_tokens,
            stop_reason=self._job.stop_reason if reason else None,
            prompt_logprobs=self._job.prompt_logprobs if first == 0 else None,
        )

    def close(self) -> None:
        """Cancel the request unless it has ended; what was not read is dropped."""
        self._is_closed = True
        self._shared.cancel([self._job])
        self._inbox.clear()

    def __del__(self) -> None:
        self._shared.cancel([self._job])


def describe_errors(errors: Sequence[tuple[int, str]], prompts: int) -> str:
    """One line for the prompts that have no answer, each given with its error."""
    place, error = errors[0]
    if prompts == 1:
        return error
    count = f"{len(errors)} of {prompts} prompts have no answer" if len(errors) > 1 else "one prompt has no answer"
    return f"{count} (`completions` of this error holds all others); prompt {place}: {error}"
