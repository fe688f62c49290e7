"""Requests that came to numbers that are not finite: what their error says, and the cause, sought between steps.

A step only notes them, so that the others in it are not held up. Next: causes.py, which looks into the model.
"""

from collections.abc import Iterator

import torch

from saccade.engine.buffers import Buffers, Run
from saccade.engine.causes import Causes, Part
from saccade.engine.device import on
from saccade.engine.pages import clear_states
from saccade.engine.request import Job
from saccade.engine.scheduler import Scheduler, count_pages
from saccade.ops.step import Cache


class Failures:
    """Those of one engine. `causes`: None where nobody can look into the model."""

    def __init__(
        self,
        causes: Causes | None,
        scheduler: Scheduler,
        buffers: Buffers,
        cache: Cache,
        device: torch.device | str,
    ) -> None:
        self._causes, self._scheduler, self._buffers = causes, scheduler, buffers
        self._cache, self._device = cache, device
        self._unexplained: list[tuple[Job, int]] = []  # and where the numbers that are not finite came up

    def note(self, job: Job, position: int) -> str:
        """Note that a job has no answer: what follows `position` is not finite. The cause is sought between steps."""
        what = "log-probabilities" if job.request.targets is not None or job.params.logprobs is not None else "logits"
        job.error = f"there is no answer: the {what} behind position {position} are not finite (NaN or infinity)"
        self._unexplained.append((job, position))
        return "error"

    def explain(self) -> None:
        """Add the cause to each new error of a job, as far as it can be found. Call it between steps."""
        while self._unexplained:
            job, position = self._unexplained.pop()
            cause = self._find_cause(job, position)
            if cause is not None:
                job.error = f"{job.error}; {cause}; `saccade check --contents` judges the checkpoint's numbers"

    @torch.inference_mode()
    def _find_cause(self, job: Job, position: int) -> str | None:
        """Look at the parameters, then run the tokens up to `position` again, in pages that are free."""
        if self._causes is None:
            return None
        pages, tokens = self._scheduler.pages, job.request.tokens[: position + 1]
        taken = list[int]()
        try:
            with on(self._device):
                cause = self._causes.find_parameter()
                if cause is None and count_pages(len(tokens)) <= pages.free:
                    taken = pages.take(count_pages(len(tokens)))
                    cause = self._causes.find_layer(self._lay_out(tokens, taken), self._cache)
            return cause
        except RuntimeError:  # memory that is not there: the error stands without its cause
            return None
        finally:
            pages.release(taken)

    def _lay_out(self, tokens: list[int], pages: list[int]) -> Iterator[Part]:
        """A request's tokens in batches; each is done with before the next."""
        most = self._scheduler.max_batch_tokens
        clear_states(self._cache, [0])  # no request's: between two steps nobody else writes there
        for start in range(0, len(tokens), most):
            some = tokens[start : start + most]
            yield Part(self._buffers.fill([Run(some, start, pages, 0)]), len(some))
