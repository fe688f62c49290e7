"""A request with what has come out of it so far: text, log-probabilities, scores, selections.

The scheduler's Request is bare of tensors and text; this is the rest of it, filled by engine.py step by step and read
by llm.py. Knows no model and no file. Next: engine.py.
"""

from dataclasses import dataclass, field

from torch import Tensor

from saccade.engine.pace import Tally
from saccade.engine.params import SamplingParams
from saccade.engine.sampling.choice import Choice
from saccade.engine.sampling.grammar import GrammarMatch
from saccade.engine.scheduling.requests import Request
from saccade.engine.steps.selections import HeldParts, SelectionParts
from saccade.errors import NoAnswerError, NumericsError
from saccade.text.detokenize import TextStream


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
    ends: frozenset[int] = frozenset()  # tokens that end it
    seen: SelectionParts | None = None  # capturing: takes what is selected

    def __post_init__(self) -> None:
        params, request = self.params, self.request
        asks = params.logprobs is not None or params.prompt_logprobs is not None or params.changes_logits
        # Whether of a step it wants its next token and, at most, what was selected.
        self.is_plain = not (asks or self.match or request.targets is not None)

    @property
    def finish_reason(self) -> str | None:
        return self.request.finish_reason

    def selections(self, first: int = 0) -> list[Tensor]:
        """Per layer, i32 [positions, K] on the host: what each position from `first` on was allowed to see, -1 padded.

        The last generated token was never run and has no row. K is index_topk, or less in a short request.
        """
        parts = self.seen if isinstance(self.seen, HeldParts) else HeldParts()
        return list(parts.join(len(self.request.tokens) - 1, first).unbind(0))
