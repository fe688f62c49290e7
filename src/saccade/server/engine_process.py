"""The process that runs the engine: takes prompts from a socket, steps, and sends back what each step added.

One thread steps, another one reads the socket, so that a step never waits for a client. It ends with its parent: at the
end of the socket, and by the kernel's signal if the parent is killed. Knows no HTTP. Next: engine_client.py, which
starts it; api/llm.py, which it runs.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saccade.api.threads import sleeping_threads
from saccade.base.memory import is_refusal
from saccade.engine.scheduling.prefix_cache import PrefixTally
from saccade.errors import NumericsError, RequestError, SaccadeError
from saccade.plan.show import show_bytes
from saccade.server.wire import (
    Cancel,
    Counts,
    Delta,
    Failed,
    Load,
    LoadProgress,
    Note,
    Ping,
    Pong,
    Ready,
    Refused,
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
    from saccade.engine.sample import Choice
    from saccade.engine.shared import Delivery

PR_SET_PDEATHSIG = 1
MOST_FAILURES = 3  # steps that fail one after the other: the device is lost, or the weights are


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
            elif isinstance(message, Cancel):
                self._cancel(message)

    def _cancel(self, message: Cancel) -> None:
        self.shared.cancel([self.open.pop(id)[0] for id in message.ids if id in self.open])
        for id in message.ids:
            self._shown.pop(id, None)
        if not self.open:  # no step will tell
            self.link.send(Stepped([], self._measure()))

    def _submit(self, asked: Submit) -> None:
        def add(engine: Any) -> "tuple[Job, deque[Delivery]]":
            job = engine.add(asked.tokens, asked.params)
            return job, self.shared.open(job)

        try:
            self.open[asked.id] = self.shared.admit(add)
        except RequestError as error:
            self.link.send(Taken(asked.id, str(error)))
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
            if self._failures >= MOST_FAILURES or not isinstance(error, SaccadeError):
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
        if job.failure is not None:
            error = describe(job.failure)
        if not (tokens or text or reason or error):
            return None
        first = self._shown.get(id, 0)
        self._shown[id] = first + len(tokens)
        logprobs = prompt = None
        if job.params.logprobs is not None:
            logprobs = make_rows(job.logprobs[first : first + len(tokens)])
        if job.params.prompt_logprobs is not None and not first:
            prompt = make_rows(getattr(job, "prompt_logprobs", None) or [])
        counts = Counts()
        if reason or error:
            tally = job.tally
            counts = Counts(job.request.cached_tokens, sum(tally.drafted), sum(tally.accepted))
        return Delta(tokens, text, logprobs, reason if error is None else None, error, counts, prompt)

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


def make_rows(choices: "Sequence[Choice]") -> list[TokenRow]:
    return [(choice.token, choice.logprob, list(choice.top)) for choice in choices]


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SaccadeError) else f"{type(error).__name__}: {text}" if text else repr(error)


def load_model(options: dict[str, Any], link: Link) -> "LLM":
    """The model that `options`, those of `prepare`, describe. Tells how far it is."""
    with sleeping_threads():
        from saccade.api.llm import LLM
        from saccade.api.prepare import prepare

    def watch(verb: str) -> Any:
        told = [0.0]

        def tell(done: int, total: int) -> None:
            if done == total or time.monotonic() - told[0] > 0.1:
                told[0] = time.monotonic()
                link.send(LoadProgress(verb, done, total))

        return tell

    prepared = prepare(**options, tell=lambda line: link.send(Note(line)))
    if prepared.source.missing:
        prepared = prepared.fetch(watch("fetching"))
    start = time.perf_counter()
    llm = LLM.of(prepared, watch("loading"))
    s, seconds = llm.settings, time.perf_counter() - start
    for note in s.notes:
        link.send(Note(f"note: {note}"))
    size, how = show_bytes(prepared.plan.device_bytes), f"dtype {s.dtype}, {s.device}, {s.kernels} kernels"
    scheduler, engine = llm.engine.scheduler, llm.engine
    link.send(
        Ready(
            path=str(prepared.source.directory),
            config=llm.config,
            max_length=scheduler.max_length,
            capacity=scheduler.capacity,
            max_requests=scheduler.max_requests,
            eos_token_ids=tuple(engine.defaults.eos_token_ids),
            speculate=s.speculate,
            loaded=f"loaded {s.path}: {size} in {seconds:.2f} s, {how}",
        )
    )
    return llm


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, Linux alone; elsewhere the socket's end does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died meanwhile
            os._exit(0)


def main(number: str, parent: str) -> int:
    """`python -m saccade.server.engine_process FD PARENT`: the exit code."""
    end_with_parent(int(parent))
    link = Link(socket.socket(fileno=int(number)))
    try:
        options = link.receive()
        llm = load_model(options, link)
    except (EOFError, ConnectionError):
        return 0
    except SaccadeError as error:
        link.send(Refused(str(error), 1 if isinstance(error, NumericsError) else 2))
        return 2
    except Exception as error:
        if is_refusal(error):
            link.send(Refused(f"the system refuses memory ({describe(error)}); free some, or ask for less", 2))
            return 2
        traceback.print_exc()
        link.send(Refused(f"the engine does not start: {describe(error)}", 70))
        return 70
    try:
        EngineLoop(llm, link).run()
    except (ConnectionError, KeyboardInterrupt):
        pass
    except Exception:
        return 70  # said and sent already
    return 0


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # the reading thread would keep it
