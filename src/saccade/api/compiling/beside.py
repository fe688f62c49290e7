"""Kernels are compiled by processes of their own while weights are loaded, unless they were compiled before.

What a start needs first comes first, then what other sizes of steps need, at low priority. Nothing waits for it: a
kernel that is not there yet is compiled where it is launched, as without it. Whatever goes wrong here is told to the
log of the level DEBUG alone. Next: order.py, worker.py.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

from saccade.api.compiling.folder import OwnFolder
from saccade.api.compiling.order import LOG, Order, count_processes, hash_order, is_compiled
from saccade.parallel.lead import make_rank_environment

WORKER = "saccade.api.compiling.worker"
OPEN_STEPS = "saccade.api.compiling.meta_model:open_meta_model"


class Compiling:
    """Processes at work on one order. The thread that starts them lives as long as they do: they die with it."""

    def __init__(self, order: Order) -> None:
        self.kernels = list[Mapping[str, Any]]()  # that were compiled, or lay in the cache
        self.failures = list[Mapping[str, Any]]()
        self._order = order
        self._groups = [Event() for _ in order.groups]
        self._is_started, self._is_ended = Event(), False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = Thread(target=self._run, name="saccade-compiling", daemon=True)
        self._thread.start()
        self._is_started.wait()

    def wait(self, group: int = 0) -> None:
        """Until a group of steps has all its kernels, or will not get them."""
        self._groups[group].wait()

    def end(self) -> None:
        """End the processes, those that they run included. What they have compiled stays."""
        self._is_ended = True
        if self._process is not None and self._thread.is_alive():
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if current_thread() is not self._thread:  # where the last reference to an LLM may end, too
            self._thread.join()

    def _run(self) -> None:
        try:
            folder = OwnFolder()  # for the assembler's files, which it leaves if it is ended
            try:
                self._listen(folder.path)
            finally:
                folder.remove()
        except Exception as error:  # no start fails because of this
            LOG.debug("kernels are not compiled beside the start: %s", error)
        finally:
            self._is_started.set()
            for group in self._groups:
                group.set()

    def _listen(self, folder: str) -> None:
        process = self._process = start_worker(folder)
        self._is_started.set()
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError), process.stdin:
            pickle.dump(self._order, process.stdin)
        last = ""
        with process.stdout:
            for line in process.stdout:
                last = self._note(line.decode(errors="replace").strip()) or last
        if process.wait() and not self._is_ended:
            LOG.debug("a process that compiles kernels ended with exit code %s: %s", process.returncode, last)

    def _note(self, line: str) -> str:
        """Take in what the process says; the line, if it is a message of something else."""
        try:
            told = json.loads(line)
            if "kernel" in told:
                self.kernels.append(told)
            elif "failed" in told:
                self.failures.append(told)
                LOG.debug("%s is compiled when it is launched: %s", told["failed"], told["why"])
            else:
                LOG.debug("kernels of group %d of steps: after %.1f s", told["group"], told["seconds"])
                self._groups[told["group"]].set()
        except (ValueError, TypeError, KeyError, IndexError):
            return line
        return ""


def start_worker(folder: str) -> subprocess.Popen[bytes]:
    """It sees no GPU, and keeps what it writes for others in `folder`. A group of its own is ended as a whole, and a
    terminal's Ctrl-C, which may mean an answer, does not reach it."""
    env = {name: value for name, value in make_rank_environment(os.environ).items() if name != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", WORKER, str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True,
    )  # fmt: skip


def compile_beside(prepared: Any, environment: Mapping[str, str] = os.environ) -> Compiling | None:
    """Begin to compile the kernels of a model that prepare.py has let pass. None where none are needed, were compiled
    before, or are another rank's of this machine to compile; then nothing is started."""
    s, place = prepared.settings, prepared.place
    count = count_processes(environment) if s.kernels == "fast" and place.local_rank == 0 else 0
    if not count:
        return None
    try:
        return start_unless_compiled(order_all(prepared, count), environment)
    except Exception as error:  # no start fails because of this
        LOG.debug("kernels are not compiled beside the start: %s", error)
        return None


def order_all(prepared: Any, count: int) -> Order:
    """All steps of the model."""
    from saccade.api.compiling.meta_model import MetaShape, forget_sizes, group_steps
    from saccade.api.loading.machine import find_capability

    plan, settings = prepared.plan, forget_sizes(prepared.settings)
    shape = MetaShape(prepared.config, plan.stored, plan.layout, settings)
    return Order(shape, group_steps(settings), OPEN_STEPS, find_capability(prepared.settings.device), count, "")


def start_unless_compiled(order: Order, environment: Mapping[str, str] = os.environ) -> Compiling | None:
    """Compile an order, unless a stamp beside Triton's kernels says that it was."""
    import torch
    import triton
    from triton import knobs

    if environment.get("TRITON_INTERPRET") == "1":
        return None
    name = hash_order(order, (torch.__version__, triton.__version__), environment)
    stamp = Path(knobs.cache.dir) / f"saccade-{name}.json"
    return None if is_compiled(stamp) else Compiling(order._replace(stamp=str(stamp)))
