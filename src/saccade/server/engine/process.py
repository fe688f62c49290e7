"""The process that runs the engine: how it starts, and how it ends.

It ends with its parent: at the end of the socket, and by the kernel's signal if the parent is killed. Knows no HTTP.
Next: start.py, which starts it; loop.py, what it does; api/llm.py, which it runs.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from saccade.api.settings.threads import sleeping_threads
from saccade.base.memory import is_refusal
from saccade.errors import NumericsError, SaccadeError
from saccade.plan.show import show_bytes
from saccade.server.engine.loop import EngineLoop, Link, describe
from saccade.server.engine.wire import LoadProgress, Note, Ready, Refused

if TYPE_CHECKING:
    from saccade.api.llm import LLM

PR_SET_PDEATHSIG = 1


def load_model(options: dict[str, Any], link: Link) -> "LLM":
    """The model that `options`, those of `prepare`, describe. Tells how far it is."""
    with sleeping_threads():
        from saccade.api.llm import LLM
        from saccade.api.loading.prepare import prepare

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
    """`python -m saccade.server.engine.process FD PARENT`: the exit code."""
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
