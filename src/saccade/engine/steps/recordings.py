"""Steps that came before, in CUDA graphs, by the objects that they work on. Knows no model. Next: engine/graphs.py, who
records what."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

MOST_GRAPHS = 100  # of an engine: as many as 20 sizes of decode steps at 5 widths of page tables


@dataclass
class Recording(Generic[T]):
    """A step that can be run again, over new contents of the same tensors."""

    replay: Callable[[], None]
    result: T  # what it returns, written anew by each replay


def record(run: Callable[[], T], pool: Any) -> Recording[T]:
    """`run` in a CUDA graph. Graphs that share a `pool` use the same memory for all but what they return, so only one
    may be running. Other threads may use the device meanwhile: a push copies weights."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return Recording(graph.replay, result)


Recorder = Callable[[Callable[[], Any], Any], Recording[Any]]


class Recordings:
    """Steps that came before, each recorded when it comes for the second time: the first has compiled its kernels."""

    def __init__(self, most: int = MOST_GRAPHS, record: Recorder = record):
        """`most`: that are kept; the one that was not run for longest goes first."""
        self._most, self._record = most, record
        self._pool: Any = None  # torch's handle of the graphs' memory
        # The objects a step works on, by their ids: held, so that no others get those. The latest step is the last.
        self._steps: dict[tuple[Hashable, ...], tuple[tuple[object, ...], Recording[Any] | None]] = {}
        self._too_large: set[tuple[Hashable, ...]] = set()  # for the memory that is left

    def count(self) -> int:
        """Steps that are recorded."""
        return sum(found is not None for _, found in self._steps.values())

    def run(self, held: tuple[object, ...], how: Hashable, step: Callable[[], T]) -> T:
        """What `step` returns, which holds until the next one of the same kind. It works on the objects `held`, whose
        tensors keep their addresses, in the way `how`."""
        key = (*map(id, held), how)
        known = self._steps.pop(key, None)
        found: Recording[Any] | None = None
        if known is not None:
            found = known[1] or self._try(key, step)
        self._steps[key] = held, found
        if len(self._steps) > self._most:
            oldest = next(iter(self._steps))
            del self._steps[oldest]
            self._too_large.discard(oldest)
        if found is None:
            return step()
        found.replay()
        result: T = found.result
        return result

    def _try(self, key: tuple[Hashable, ...], step: Callable[[], T]) -> Recording[T] | None:
        """The step, recorded; None if its memory is not there beside what steps that are not recorded have taken."""
        if key in self._too_large:
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return self._record(step, self._pool)
        except torch.cuda.OutOfMemoryError:
            self._too_large.add(key)
            return None
