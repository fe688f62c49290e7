"""A request as the scheduler sees it, and what a step runs of it. Knows no tensor and no text. Next: scheduler.py."""

from dataclasses import dataclass, field
from typing import NamedTuple

from saccade.engine.params import SamplingParams

UNKNOWN = -1  # a token that is being chosen


@dataclass(eq=False)
class Request:
    """One sequence on its way. Two requests are the same only if they are the same object."""

    id: int
    tokens: list[int]  # the prompt, then what was generated
    prompt_length: int
    max_length: int  # the request ends when `tokens` is this long
    params: SamplingParams = SamplingParams()
    targets: list[int] | None = None  # scoring only: the token after each prompt token; nothing is generated
    computed: int = 0  # leading tokens whose cache rows are right; rolling back is lowering this number
    followed: int = 0  # leading tokens whose rows in the drafting layer's cache are right
    draft: list[int] = field(default_factory=list)  # guesses for the next tokens, to be verified in the next step
    pages: list[int] = field(default_factory=list)
    slot: int = 0  # its place in states, while it runs; place 0 is nobody's
    finish_reason: str | None = None  # "stop", "length", "error" or "cancelled"
    preemptions: int = 0
    is_whole: bool = False  # each row must be computed for it: scores, selections or a prompt's log-probabilities
    reached: int = 0  # leading tokens whose rows it has had at some time, whether or not they are still there
    cached_tokens: int = 0  # of those, found instead of computed
    keys: list[bytes] = field(default_factory=list)  # of its first pages, as far as they are full
    unknown: int = 0  # last tokens that steps under way are choosing: places for them, which hold UNKNOWN
    row: int = 0  # of the latest of those steps: the row of its choices that is this request's
    settled: int = 0  # leading pages that were found, or are to be found by others: nobody writes to them
    rounded: int = 0  # leading tokens whose steps round, while it runs: see step_kinds.py

    @property
    def pending(self) -> int:
        """Known tokens that have not been through the model: 1 while decoding, more during prefill."""
        return len(self.tokens) - self.computed

    @property
    def rounds(self) -> bool:
        """Whether its next token runs in a step that rounds."""
        return self.computed < self.rounded

    @property
    def ready(self) -> int:
        """Of the pending tokens, those that may run in one step."""
        return self.rounded - self.computed if self.computed < self.rounded else self.pending

    @property
    def is_full(self) -> bool:
        """Whether its last token is known, or being chosen: that one is never run."""
        return len(self.tokens) >= self.max_length

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class Chunk(NamedTuple):
    """`size` tokens of a request, from position `request.computed` on; drafts come after the known tokens."""

    request: Request
    size: int
    ahead: int = 0  # guesses that may be made behind it: there are pages for them

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next token can be chosen."""
        return self.size >= self.request.pending
