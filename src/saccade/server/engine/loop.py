"""The engine between two steps: takes prompts, steps, and sends back what each step added to which answer.

One thread steps, another one reads the socket, so that a step never waits for a client. Knows no HTTP and no files.
Next: process.py, whose loop this is; engine/shared.py, which steps.
"""

import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from saccade.engine.scheduling.prefix_cache import PrefixTally
from saccade.errors import NumericsError, RankError, SaccadeError
from saccade.look.selected import list_selected
from saccade.server.engine.wire import (
    Cancel,
    Counts,
    Delta,
    Failed,
    Load,
    Looked,
    Ping,
    Pong,
    Stepped,
    Submit,
    Taken,
    TokenRow,
    pack,
    receive,
)

if TYPE_CHECKING:
    from collections import deque

    from saccade.api.llm import LLM
    from saccade.engine.request import Job
    from saccade.engine.sampling.choice import Choice
    from saccade.engine.shared import Delivery

MOST_FAILURES = 3  # steps that fail one after the other: the device is lost, or the weights are


class Compiled(NamedTuple):
    """The grammar of a prompt is compiled, or it cannot be."""

    asked: Submit


class Link:
    """The engine's end of the socket. Any thread may send."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._sending = end, threading.Lock()

    def send(self, message: Any) -> None:
        with self._sending:
            self._end.sendall(pack(message))

    def receive(self) -> Any:
        return receive(self._end)


class EngineLoop:
    """Steps while there are requests, and waits for messages while there are none."""

    def __init__(self, llm: "LLM", link: Link) -> None:
        self.llm, self.link, self.shared = llm, link, llm.shared
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.open: dict[int, tuple[Job, deque[Delivery]]] = {}
        self._compilers = ThreadPoolExecutor(2)
        self._compiling: set[int] = set()  # prompts whose grammar is being compiled
        self._shown: dict[int, int] = {}  # tokens that were sent
        self._steps, self._failures = 0, 0
        self._began: float | None = None  # the step under way

    def read(self) -> None:
        """In a thread of its own: hand messages on, answer pings, and end the process with its parent."""
        try:
            while True:
                message = self.link.receive()
                if isinstance(message, Ping):
                    began = self._began
                    self.link.send(Pong(0.0 if began is None else time.monotonic() - began))
                else:
                    self.messages.put(message)
        except (EOFError, OSError):
            os._exit(0)

    def run(self) -> None:
        threading.Thread(target=self.read, daemon=True).start()
        while True:
            self._take_messages()
            if self.open:
                self._step()

    def _take_messages(self) -> None:
        """All that have come; waits for one while there is nothing else to do."""
        while True:
            try:
                message = self.messages.get(block=not self.open)
            except queue.Empty:
                return
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Compiled) and message.asked.id in self._compiling:
                self._compiling.discard(message.asked.id)
                self._queue(message.asked)
            elif isinstance(message, Cancel):
                self._cancel(message)

    def _cancel(self, message: Cancel) -> None:
        self.shared.cancel([self.open.pop(id)[0] for id in message.ids if id in self.open])
        for id in message.ids:
            self._shown.pop(id, None)
            self._compiling.discard(id)
        if not self.open:  # no step will tell
            self.link.send(Stepped([], self._measure()))

    def _submit(self, asked: Submit) -> None:
        """Queue a prompt; with a grammar, when that is compiled, which may take a second and holds up nobody."""
        if asked.params.constraint is None:
            self._queue(asked)
        else:
            self._compiling.add(asked.id)
            self._compilers.submit(self._compile, asked, asked.params.constraint)

    def _compile(self, asked: Submit, constraint: tuple[str, str]) -> None:
        with suppress(SaccadeError):  # which is said when the prompt is queued
            self.llm.engine.wanted.grammars.compile(constraint)  # a cache keeps it
        self.messages.put(Compiled(asked))

    def _queue(self, asked: Submit) -> None:
        def add(engine: Any) -> "tuple[Job, deque[Delivery]]":
            job = engine.add(asked.tokens, asked.params, asked.capture)
            return job, self.shared.open(job)

        try:
            self.open[asked.id] = self.shared.admit(add)
        except SaccadeError as error:
            self.link.send(Taken(asked.id, str(error)))
        except Exception as error:  # a bug: the others' answers go on
            traceback.print_exc()
            self.link.send(Taken(asked.id, f"a bug of the engine: {describe(error)}", is_bug=True))
        else:
            self.link.send(Taken(asked.id))

    def _step(self) -> None:
        self._began = time.monotonic()
        try:
            self.shared.step()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            traceback.print_exc()
            if self._failures >= MOST_FAILURES or is_fatal(error):
                self._send(describe(error))
                raise
        finally:
            self._began = None
        self._steps += 1
        self._send()

    def _send(self, failure: str | None = None) -> None:
        deltas = list[tuple[int, Delta]]()
        for id, (job, inbox) in list(self.open.items()):
            delta = self._collect(id, job, inbox)
            if delta is not None:
                deltas.append((id, delta))
                if delta.is_last:
                    del self.open[id]
                    self.shared.cancel([job])  # forgets its inbox
                    self._shown.pop(id, None)
        self.link.send(Stepped(deltas, self._measure()))
        if failure is not None:
            self.link.send(Failed(failure))

    def _collect(self, id: int, job: "Job", inbox: "deque[Delivery]") -> Delta | None:
        """What steps have added to an answer; None if nothing."""
        tokens, text = list[int](), ""
        while inbox:
            update = inbox.popleft().update
            tokens += update.tokens
            text += update.text
        reason, error = job.finish_reason, job.error
        kind = "not_finite" if issubclass(job.error_type, NumericsError) else "no_answer"
        if job.failure is not None:
            error, kind = describe(job.failure), "failed"
        if not (tokens or text or reason or error):
            return None
        first = self._shown.get(id, 0)
        self._shown[id] = first + len(tokens)
        logprobs = prompt = None
        if job.params.logprobs is not None:
            logprobs = make_rows(job.logprobs[first : first + len(tokens)])
        if job.params.prompt_logprobs is not None and not first:
            prompt = make_rows(getattr(job, "prompt_logprobs", None) or [])
        counts = Counts(job.request.cached_tokens)
        if reason or error:
            tally = job.tally
            counts = Counts(job.request.cached_tokens, sum(tally.drafted), sum(tally.accepted))
        looked = None
        if reason and error is None and job.seen is not None:
            answer, first = job.request.generated, job.request.prompt_length - 1  # the row that chose the first token
            looked = Looked(answer, list_selected(job.selections(first), 1, len(answer)))
        return Delta(tokens, text, logprobs, reason if error is None else None, error, counts, prompt, looked, kind)

    def _measure(self) -> Load:
        scheduler, tally = self.llm.engine.scheduler, self.llm.engine.tally
        prefix = scheduler.prefix_tally or PrefixTally()
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=scheduler.pages.count - 1,
            free_pages=scheduler.pages.free,
            steps=self._steps,
            preemptions=scheduler.preemptions,
            drafted=sum(tally.drafted),
            accepted=sum(tally.accepted),
            prefix_hits=prefix.found,
            prefix_asked=prefix.looked_up,
            prefix_pages=prefix.pages,
            prefix_evictions=prefix.evictions,
        )


def is_fatal(error: Exception) -> bool:
    """Whether no later step can go well: a rank is gone, or a GPU, whose errors stay. What else a step raises ends its
    own requests, so that one which meets a bug does not end the server."""
    return isinstance(error, RankError) or "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


def make_rows(choices: "Sequence[Choice]") -> list[TokenRow]:
    return [(choice.token, choice.logprob, list(choice.top)) for choice in choices]


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SaccadeError) else f"{type(error).__name__}: {text}" if text else repr(error)
