"""A step on its way: launched, and not waited for yet. Next: engine.py launches it, answers.py says what it brought."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from saccade.engine.request import Job
from saccade.engine.sample import ReadBack
from saccade.engine.scheduling.requests import Chunk
from saccade.engine.steps.selections import StepSelections


class Flight(NamedTuple):
    """A step on its way. The lists have an item for each chunk."""

    chunks: list[Chunk]
    jobs: list[Job]
    counts: list[int]  # rows of logits
    is_booked: list[bool]  # by `Scheduler.book`: what it computes is counted as computed already
    reading: ReadBack | None  # None: no row of logits is wanted
    capture: StepSelections | None  # what was selected, if anybody wants it
    is_followed: bool  # the drafting layer runs too
    made: int  # drafts of each request
    drafts: int  # that were asked for
    is_timed: bool

    @property
    def is_plain(self) -> bool:
        """Whether what is read is one token a row."""
        return not self.is_followed and (self.reading is None or self.reading.is_plain)

    @property
    def is_awaited(self) -> bool:
        """Whether any of its requests has not ended meanwhile."""
        return any(chunk.request.finish_reason is None for chunk in self.chunks)

    def read(self) -> tuple[list[Any], Sequence[list[int] | None]]:
        """Wait for it. What was chosen for each row: tokens, or Choices; and new drafts of each chunk, or None where
        the drafting layer did not run."""
        none: list[list[int] | None] = [[] if self.is_followed else None for _ in self.chunks]
        if self.reading is None:
            return [], none
        if self.is_plain:
            return self.reading.wait(), none
        choices, beside = self.reading.read_choices()
        return choices, beside if self.made else none
