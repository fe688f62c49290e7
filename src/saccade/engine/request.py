"""A request with what has come out of it so far: text, log-probabilities, scores, selections.

The scheduler's Request is bare of tensors and text; this is the rest of it, filled by engine.py step by step and read
by llm.py. Knows no model and no file. Next: engine.py.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saccade.engine.pace import Tally
from saccade.engine.params import SamplingParams
from saccade.engine.sample import Choice
from saccade.engine.sampling.grammar import GrammarMatch
from saccade.engine.scheduling.requests import Request
from saccade.errors import NoAnswerError, NumericsError
from saccade.text.detokenize import TextStream


class SelectionParts(Protocol):
    """What takes the selections of a request, step by step: a list, or a file."""

    def append(self, part: tuple[int, Tensor], /) -> None: ...


@dataclass(eq=False)
class Job:
    """A request and what has come out of it so far."""

    request: Request
    params: SamplingParams  # complete: nothing is None but max_tokens, seed and logprobs
    seed: int
    stream: TextStream | None  # None without a tokenizer
    text: str = ""  # certain so far
    logprobs: list[Choice] = field(default_factory=list)  # per generated token, if asked for
    scores: list[float] = field(default_factory=list)  # scoring: of each token but the first
    tally: Tally = field(default_factory=Tally)  # of its steps beyond the prompt, and the drafts in them
    error: str | None = None  # why there is no answer: its numbers are not finite, or no token is left to choose
    error_type: type[NoAnswerError] = NumericsError  # of that
    failure: Exception | None = None  # what a step raised that it was in
    prompt_logprobs: list[Choice] | None = None  # of each token of the prompt but the first, if asked for
    match: GrammarMatch | None = None  # follows the answer through its grammar
    stop_reason: int | str | None = None  # the stop string or the token of stop_token_ids that ended it
    seen: "SelectionParts | None" = None  # capturing: (position of the first, i32 [layers, tokens, K])

    @property
    def finish_reason(self) -> str | None:
        return self.request.finish_reason

    def selections(self) -> list[Tensor]:
        """Per layer, i32 [positions, K] on the host: what each position was allowed to see, -1 padded.

        The last generated token was never run and has no row. K is index_topk, or less in a short request.
        """
        parts = self.seen if isinstance(self.seen, list) else []
        layers, width = (parts[0][1].shape[0], max(part.shape[2] for _, part in parts)) if parts else (0, 0)
        length = max((start + part.shape[1] for start, part in parts), default=0)
        length = min(length, len(self.request.tokens) - 1)
        seen = torch.full((layers, length, width), -1, dtype=torch.int32)
        for start, part in parts:  # what was computed again after a preemption is the same again
            part = part[:, : max(0, length - start)]
            seen[:, start : start + part.shape[1]] = -1
            seen[:, start : start + part.shape[1], : part.shape[2]] = part
        return list(seen.unbind(0))
