"""An engine that any thread may call: all share its steps, and each gets its own answers.

Requests are queued, cancelled and stepped in turns of one step each (turns.py). What a step raises reaches everybody
whose request was in it; what interrupts one thread, nobody else. A push lets requests end and holds new ones back
meanwhile. A server's event loop can use it as `LLM` does. Knows no prompts in text and no files. Next: llm.py.
"""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from saccade.engine.engine import Engine
from saccade.engine.request import Job
from saccade.engine.steps.answers import Update
from saccade.engine.turns import Turns
from saccade.ops.device import on

T = TypeVar("T")


class Delivery(NamedTuple):
    """What one step added to a job, and why its answer ended, if it did; not by an error."""

    update: Update
    finish_reason: str | None


class SharedEngine:
    """The engine and its turns. None of these methods waits for another caller's answer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.turns = Turns(partial(make_current, engine.device))
        self.inboxes: dict[Job, deque[Delivery]] = {}  # of open streams
        self._drains = 0  # pushes that let requests end: new ones wait
        engine.allow_interrupts(self.turns.hold.opened)

    def admit(self, queue: Callable[[Engine], T]) -> T:
        """What `queue` returns, which puts requests into the engine. Waits while a push lets the others end."""
        while True:
            if self._drains:
                self.turns.wait(lambda: not self._drains)
            with self.turns.turn():
                if not self._drains:
                    return queue(self.engine)

    def run(self, jobs: Sequence[Job]) -> None:
        """Until all `jobs` have ended. Raises what a step with one of them raised; none of them stays behind then."""
        try:
            self.turns.wait(partial(has_ended, jobs), self._step)
        finally:
            self.cancel(jobs)
        for job in jobs:
            if job.failure is not None:
                raise job.failure

    def open(self, job: Job) -> deque[Delivery]:
        """Where steps leave what they add to `job`. For `queue` of `admit`, so that nothing is missed."""
        return self.inboxes.setdefault(job, deque())

    def take(self, job: Job, inbox: deque[Delivery]) -> Delivery | None:
        """The next of `inbox`; None behind the last. Raises what a step with `job` raised."""
        if not inbox:
            self.turns.wait(lambda: bool(inbox) or job.finish_reason is not None, self._step)
        try:
            return inbox.popleft()
        except IndexError:
            self.inboxes.pop(job, None)
            if job.failure is not None:
                raise job.failure from None
            return None

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End those that have not ended; their pages are free at the end of the step under way, or at once. Never
        waits: finalizers may call it."""
        for job in jobs:
            self.inboxes.pop(job, None)
        left = [job for job in jobs if job.finish_reason is None]
        if left:
            self.turns.post(partial(self._end, left))

    def step(self) -> None:
        """One step for everybody. Raises what it raises, which those who wait for its requests get as well."""
        with self.turns.turn():
            error = self._step()
        if error is not None:
            raise error

    @contextmanager
    def drained(self) -> Iterator[None]:
        """A turn in which no request is left; those that come wait until it has ended. What open streams have not read
        yet waits for them."""
        with self.turns.hold:
            try:
                with self.turns.turn():
                    self._drains += 1
                self.turns.wait(lambda: not self.engine.jobs, self._step)
                with self.turns.turn(), on(self.engine.device):
                    self.engine.settle()
                    yield
            finally:
                self.turns.post(self._reopen)

    def _reopen(self) -> None:
        self._drains -= 1

    def _end(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.engine.cancel(job)

    def _step(self) -> Exception | None:
        """In a turn. What a step raises ends its requests, and is theirs to tell: that of the thread which happened to
        run it need not be among them."""
        try:
            updates = self.engine.step()
        except Exception as error:
            release_frames(error)
            if not self.engine.fail(error):
                raise
            return error
        for update in updates:
            inbox = self.inboxes.get(update.job)
            if update.tokens and inbox is not None:
                inbox.append(Delivery(update, None if update.job.error else update.job.finish_reason))
        self.engine.explain_failures()
        return None


def has_ended(jobs: Sequence[Job]) -> bool:
    """All of them, or one by what a step raised."""
    return all(job.finish_reason is not None for job in jobs) or any(job.failure is not None for job in jobs)


def release_frames(error: BaseException) -> None:
    """Let go of what the functions in its traceback held: callers keep the error, but not the tensors of its step."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def make_current(device: torch.device | str) -> None:
    """Make the CUDA context of a device current in this thread. Triton's tensor descriptors need one, and what torch
    asks of its own allocator makes none: only a call that reaches the driver does."""
    with on(device):
        torch.zeros(1, device=device)
