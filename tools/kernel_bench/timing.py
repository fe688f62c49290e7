"""A kernel's time among its like: launches over many sets of weights, captured in one graph, replayed cold.

One set alone would be read from the L2 cache, and single launches would measure the host. Next: rows.py, an example.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Set = TypeVar("Set")
REPLAYS = 20


def time_each(launch: Callable[[Set], object], sets: Sequence[Set], replays: int = REPLAYS) -> float:
    """Median microseconds of one `launch`, over graphs that launch once for each of `sets`."""
    for one in sets[:2]:
        launch(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            launch(one)
    graph.replay()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))
    return times[replays // 2] * 1000 / len(sets)


def measure_bandwidth(gigabytes: float = 4.0) -> float:
    """TB/s of a plain reduction over memory that no cache holds."""
    data = torch.ones(int(gigabytes * 2**28), dtype=torch.float32, device="cuda")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    data.sum()
    for mark in marks:
        mark.record()
        data.sum()
    torch.cuda.synchronize()
    best = min(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))
    return data.numel() * 4 / best / 1e9


def try_variant(name: str, run: Callable[[], str]) -> None:
    """Print what a variant gives, or why it fails: one that does not compile must not end the comparison."""
    try:
        print(f"{name:58} {run()}", flush=True)
    except Exception as error:  # whatever a compiler says
        print(f"{name:58} FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
