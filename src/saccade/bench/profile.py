"""Which kernels a step is made of, and what each of them takes: seen by the profiler, over several runs.

A kernel's time is counted from the end of the one before it to its own end. With programmatic dependent launch kernels
begin early and wait, so their own durations overlap; these times do not, and their sum is the step. A layer is found as
what repeats: nothing here knows what a kernel computes. Next: plot.py.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

LONGEST = 64  # kernels of a layer
MESSAGES = ("sum_blocks", "gather_blocks", "ncclDevKernel", "ncclKernel")  # kernels that wait for other ranks
NOT_KERNELS = ("ProfilerStep", "## ", "Memcpy HtoD", "Memcpy DtoH")


class KernelRun(NamedTuple):
    """A kernel that ran; microseconds."""

    name: str
    start: float
    end: float


def time_kernels(run: Callable[[], object], device: torch.device, runs: int = 6) -> list[tuple[str, float]]:
    """(name, us) of every kernel of one `run`, in order; the median over `runs`. [] if the profiler sees none, or not
    the same kernels in every run."""
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(runs):
            run()
            torch.cuda.synchronize(device)
    events = seen.events() or []
    spans = [
        KernelRun(e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type.name == "CUDA" and not e.name.startswith(NOT_KERNELS)
    ]
    return merge_runs(spans, runs)


def time_communication(run: Callable[[], object], device: torch.device, runs: int = 6) -> dict[str, float]:
    """Messages of one `run` between ranks, and the microseconds that they take; {} if the profiler cannot tell. All
    ranks ask at the same time. A message ends when the last rank has come, so this counts waiting, too."""
    if runs < 1:
        return {}
    times = [us for name, us in time_kernels(run, device, runs) if name.startswith(MESSAGES)]
    return {"messages": len(times), "us": sum(times)} if times else {}


def merge_runs(spans: Sequence[KernelRun], runs: int) -> list[tuple[str, float]]:
    """The median of each kernel's time over equal runs. Its first kernel's is its own duration."""
    ordered = sorted(spans, key=lambda s: (s.start, s.end))
    count = len(ordered) // runs
    pieces = [ordered[i * count : (i + 1) * count] for i in range(runs)]
    names = [s.name for s in pieces[0]]
    if not count or len(ordered) % runs or any([s.name for s in piece] != names for piece in pieces):
        return []
    times = []
    for piece in pieces:
        last, row = piece[0].start, []
        for span in piece:
            row.append(max(0.0, span.end - last))
            last = max(last, span.end)
        times.append(row)
    return list(zip(names, map(statistics.median, zip(*times, strict=True)), strict=True))


def find_layer(names: Sequence[str]) -> tuple[int, int, int] | None:
    """(first, period, repeats) of the longest stretch of names that repeats itself, by the shortest period that
    covers at least 9 tenths of what the best one covers; None if nothing does."""
    stretches = {}
    for period in range(1, min(LONGEST, len(names) // 2) + 1):
        best = first = length = 0
        for i in range(len(names) - period):
            length = length + 1 if names[i] == names[i + period] else 0
            if length > best:
                best, first = length, i - length + 1
        if best >= period:  # at least twice
            stretches[period] = (best + period, first)
    if not stretches:
        return None
    most = max(covered for covered, _ in stretches.values())
    period = min(p for p, (covered, _) in stretches.items() if covered >= 0.9 * most)
    covered, first = stretches[period]
    return first, period, covered // period


def fold_layer(kernels: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """(name, us) of the kernels of one layer, the median of the layers that are alike; all kernels if none are."""
    found = find_layer([name for name, _ in kernels])
    if found is None:
        return list(kernels)
    first, period, repeats = found
    layers = [kernels[first + i * period : first + (i + 1) * period] for i in range(repeats)]
    # The last kernels of a dense layer may be called as those of a sparse one: the median is not moved by them.
    times = [statistics.median(row) for row in zip(*([us for _, us in layer] for layer in layers), strict=True)]
    return [(name, us) for (name, _), us in zip(layers[0], times, strict=True)]
