"""A request with what has come out of it so far: text, log-probabilities, scores, selections.

The scheduler's Request is bare of tensors and text; this is the rest of it, filled by engine.py step by step and read
by llm.py. Knows no model and no file. Next: engine.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
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

NONE_NARROW = (1 << 16) - 1  # what -1 is in 16 bits; places below it fit as well
LARGE_STEP = 256  # tokens of a step from which on memory counts: 4,096 of DeepSeek-V3.2 select 2 GB as i32


class SelectionParts(Protocol):
    """What takes the selections of a request, step by step: a list, or a file."""

    def append(self, part: tuple[int, Tensor], /) -> None:
        """Position of the first row, and i16 or i32 [tokens, layers, K], for `widen_places`. A list copies it."""


class HeldParts(list[tuple[int, Tensor]]):
    """The selections of a request, in memory."""

    def append(self, part: tuple[int, Tensor], /) -> None:
        super().append((part[0], part[1].clone()))  # the rows of others go, and the pinned memory


class StepSelections(list[Tensor]):
    """What the layers of a step select, on its way to the host: in 16 bits where places fit, and not waited for.

    A step of 64 requests of DeepSeek-V3.2 selects 16 MB so, which is 0.3 ms at 50 GB/s.
    """

    def __init__(self, positions: int) -> None:
        """`positions`: that the page tables of the step have room for."""
        self._is_narrow = positions <= NONE_NARROW
        self._host = torch.empty(0)
        self._copied: torch.cuda.Event | None = None

    def append(self, selection: Tensor, /) -> None:
        """One layer's, i32 [T, K]. In a large step each is made small at once; else all together, in one launch."""
        is_large = self._is_narrow and len(selection) > LARGE_STEP
        super().append(selection.to(torch.int16) if is_large else selection)

    def send(self, spans: Sequence[tuple[int, int]]) -> None:
        """Begin to copy the rows from each first token to each end. Behind what the step has launched."""
        rows = [torch.stack([selection[first:end] for selection in self], 1) for first, end in spans]
        packed = rows[0] if len(rows) == 1 else torch.cat(rows)
        if self._is_narrow:
            packed = packed.to(torch.int16)
        self.clear()
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = packed

    def receive(self) -> Tensor:
        """Those rows, i16 or i32 [rows, layers, K]. Behind the choice of tokens, which was waited for, it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def list_spans(sizes: Sequence[int], is_wanted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First token and end of runs of pieces that are wanted."""
    ends = [0, *accumulate(sizes)]
    for wanted, run in groupby(range(len(sizes)), lambda i: is_wanted[i]):
        places = list(run)
        if wanted:
            yield ends[places[0]], ends[places[-1] + 1]


def widen_places(rows: Tensor) -> Tensor:
    """i32, -1 padded, of what StepSelections gave."""
    if rows.dtype != torch.int16:
        return rows
    wide = rows.to(torch.int32) & NONE_NARROW
    return wide.masked_fill_(wide == NONE_NARROW, -1)


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
    seen: "SelectionParts | None" = None  # capturing: takes (position of the first, [tokens, layers, K])

    def __post_init__(self) -> None:
        params, request = self.params, self.request
        asks = params.logprobs is not None or params.prompt_logprobs is not None or params.changes_logits
        # Whether of a step it wants its next token and, at most, what was selected.
        self.is_plain = not (asks or self.match or request.targets is not None)

    @property
    def finish_reason(self) -> str | None:
        return self.request.finish_reason

    def selections(self) -> list[Tensor]:
        """Per layer, i32 [positions, K] on the host: what each position was allowed to see, -1 padded.

        The last generated token was never run and has no row. K is index_topk, or less in a short request.
        """
        parts = self.seen if isinstance(self.seen, list) else []
        layers, width = (parts[0][1].shape[1], max(part.shape[2] for _, part in parts)) if parts else (0, 0)
        length = max((start + part.shape[0] for start, part in parts), default=0)
        length = min(length, len(self.request.tokens) - 1)
        seen = torch.full((layers, length, width), -1, dtype=torch.int32)
        for start, rows in parts:  # what was computed again after a preemption is the same again
            part = widen_places(rows[: max(0, length - start)]).transpose(0, 1)
            seen[:, start : start + part.shape[1]] = -1
            seen[:, start : start + part.shape[1], : part.shape[2]] = part
        return list(seen.unbind(0))
