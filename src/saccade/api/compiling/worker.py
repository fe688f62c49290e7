"""`python -m saccade.api.compiling.worker PARENT`: compiles an order's kernels into Triton's cache, and ends.

The order comes on stdin. This process finds out which kernels it means, a group of steps at a time, and forks as many
processes as it says, which share what it has imported; each takes the next kernel that nobody has taken. It has no GPU.
On stdout it says a line of JSON for each kernel and each group. Next: beside.py, which listens.
"""

import json
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.parallel.processes import die_with_parent

if TYPE_CHECKING:
    from saccade.api.compiling.launches import NewKernel
    from saccade.api.compiling.order import Order

NICE = 10  # of what is not urgent: the engine may serve meanwhile
MOST_SAID = 200  # characters of an error


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    compile_order(pickle.load(sys.stdin.buffer))


def compile_order(order: "Order") -> None:
    """Every kernel of every group, and the stamp if each could be compiled."""
    from saccade.api.compiling.launches import note_launches
    from saccade.api.compiling.order import write_stamp
    from saccade.models.registry import fetch_place

    begun, found = time.perf_counter(), note_launches(order.capability)
    run = fetch_place(order.open)(order.shape)
    done, forks = 0, Forks(order.processes)
    for urgency, group in enumerate(order.groups):
        for step in group:
            try:
                run(step)
            except Exception as error:  # a kernel that is missed is compiled where it is launched
                forks.failed = True
                report_line(failed=str(step), why=find_cause(error))
        forks.wait()  # for the group before
        if urgency:
            report_line(group=urgency - 1, seconds=round(time.perf_counter() - begun, 2))
        os.nice(NICE if urgency == 1 else 0)
        forks.start(found[done:])
        done = len(found)
    forks.wait()
    report_line(group=len(order.groups) - 1, seconds=round(time.perf_counter() - begun, 2))
    if order.stamp and not forks.failed:
        write_stamp(Path(order.stamp), forks.folders)


class Forks:
    """Forked processes, that compile kernels."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._running: list[tuple[int, int]] = []  # processes, and where each says the folders of its kernels
        self.failed, self.folders = False, list[str]()

    def start(self, kernels: "Sequence[NewKernel]") -> None:
        """Compile these. Those that were started before must have ended."""
        if not kernels:
            return
        taken, given = os.pipe()
        os.write(given, b"".join(struct.pack("H", i) for i in range(len(kernels))))
        os.close(given)
        own = os.getpid()
        for _ in range(min(self._count, len(kernels))):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                compile_taken(own, kernels, taken, writing)  # never comes back
            os.close(writing)
            self._running.append((pid, reading))
        os.close(taken)

    def wait(self) -> None:
        """Until all have ended."""
        for pid, reading in self._running:
            with os.fdopen(reading) as file:
                self.folders += file.read().split()
            self.failed |= os.waitpid(pid, 0)[1] != 0
        self._running.clear()


def compile_taken(parent: int, kernels: "Sequence[NewKernel]", taken: int, told: int) -> None:
    """In a process of its own: kernels whose numbers it reads from `taken`, which others read too. Ends the process,
    with 0 if all could be compiled."""
    failed = 0
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while number := os.read(taken, 2):
            kernel, start = kernels[struct.unpack("H", number)[0]], time.perf_counter()
            try:
                compiled = kernel.compile()
                if kernel is kernels[0]:
                    build_driver()
                os.write(told, f"{find_folder(compiled)}\n".encode())
                middle = time.perf_counter()
                build_launcher(compiled)
                spent = round(middle - start, 3), round(time.perf_counter() - middle, 3)
                report_line(kernel=kernel.name, hash=compiled.hash, seconds=spent[0], launcher=spent[1])
            except Exception as error:
                failed = 1
                report_line(failed=kernel.name, why=find_cause(error))
    finally:
        os._exit(failed)


def find_folder(compiled: Any) -> str:
    """Of Triton's cache, where a kernel lies."""
    from triton.runtime.cache import get_cache_manager

    return Path(get_cache_manager(compiled.hash).cache_dir).name


def build_launcher(compiled: Any) -> None:
    """What calls the kernel from Python. Triton 3.6 has the C compiler make one for each signature, in 0.3 s; later
    ones have it ready. It needs the driver's library, so without one nothing is built."""
    with suppress(Exception):  # then it is made at the first launch
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def build_driver() -> None:
    """Triton's own part in C, which it builds once, in 0.6 s."""
    with suppress(Exception):
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()


def find_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:MOST_SAID]


def report_line(**told: Any) -> None:
    """A line, whole: other processes write to the same pipe."""
    os.write(1, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main()
