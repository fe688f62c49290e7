"""Processes that play the ranks of one model, over gloo: started once for a session of tests, they run many cases.

A case is a function of this process's `DistributedRanks` and other arguments. It is found by its name, as pickle does,
so it stands in a module below tests/helpers.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saccade.models.parameters import Layout

CASE_SECONDS = 120.0  # seconds of a case, with eight such suites on two cores
LOADED = ("interpreter", "saccade.api.llm", "saccade.ops.gpu", "rank_cases")  # once, then every process has them


class RankPool:
    """Up to `most` processes, started as cases need them."""

    def __init__(self, most: int = 4) -> None:
        self._most, self._workers = most, list[tuple[Any, Connection]]()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(LOADED))
        self._folder = tempfile.TemporaryDirectory()
        self._cases = 0

    def run(self, case: Callable[..., Any], tp: int, ep: int, *args: Any, seconds: float = CASE_SECONDS) -> list[Any]:
        """What `case(ranks, *args)` returns on each rank. AssertionError with its traceback for one that raised."""
        assert tp <= self._most
        while len(self._workers) < tp:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs, dict(os.environ)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._cases += 1
        meeting = Path(self._folder.name) / str(self._cases)
        for rank, (_, pipe) in enumerate(self._workers[:tp]):
            pipe.send((case, meeting, Layout(tp, ep, rank), args, seconds))
        results = list[tuple[bool, Any]]()
        for rank in range(tp):
            results.append(self._receive(rank, seconds) if self._workers else (False, "ended with the others"))
        failed = [f"rank {rank}: {text}" for rank, (is_fine, text) in enumerate(results) if not is_fine]
        assert not failed, "\n".join(failed)
        return [result for _, result in results]

    def _receive(self, rank: int, seconds: float) -> tuple[bool, Any]:
        pipe = self._workers[rank][1]
        if not pipe.poll(seconds):
            self.close()
            return False, f"no answer in {seconds:g} s"
        try:
            answer: tuple[bool, Any] = pipe.recv()
        except EOFError:
            self.close()
            return False, "its process ended"
        return answer

    def close(self) -> None:
        for process, _ in self._workers:
            process.terminate()
            process.join(10)
        self._workers.clear()


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Run cases until the pipe ends."""
    os.environ.update(environment)
    import interpreter
    from torch.distributed import FileStore

    from saccade.parallel.distributed import DistributedRanks, join_gloo

    interpreter.mend()
    while True:
        try:
            case, meeting, layout, args, seconds = pipe.recv()
        except EOFError:
            return
        try:
            store = FileStore(str(meeting), layout.tp)
            ranks = DistributedRanks(layout, join_gloo(store, layout, timedelta(seconds=seconds)))
            answer = True, case(ranks, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
