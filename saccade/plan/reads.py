"""What one rank reads, in bytes: the runs of rows that its steps touch, and what may have to wait in memory.

Files are read by rows (a run of rows is one span of the file), so a step that takes some columns reads whole rows.
Pure arithmetic on a Plan; who reads is checkpoint/read.py.
"""

from collections.abc import Iterable, Mapping

from saccade.checkpoint.index import Entry
from saccade.plan.types import Plan, Span, Step


def rows_needed(steps: Iterable[Step], entries: Mapping[str, Entry]) -> dict[str, Span]:
    """For each tensor that the steps read, the run of rows from the first to the last that one touches. A scale of a
    dequantising step is read whole: it has a few KB."""
    needed: dict[str, Span] = {}
    for _, _, _, source, take, view, scale, _ in steps:
        lo, hi = take[0] if take else (0, 1)
        if view is not None:  # the first axis counts heads, which are runs of rows
            lo, hi = lo * view[1], hi * view[1]
        before = needed.get(source)
        needed[source] = (lo, hi) if before is None else (min(lo, before[0]), max(hi, before[1]))
        if scale is not None:
            needed[scale] = (0, row_count(entries[scale]))
    return needed


def count_read_bytes(plan: Plan) -> int:
    """Bytes of tensor data that loading this rank reads from its files."""
    return _count_bytes(plan.steps, plan.index.entries)


def count_waiting_bytes(plan: Plan) -> int:
    """The most that may wait for a partner when tensors are fed in the worst order: every dequantised tensor before
    its scale. Files leave nothing waiting, because their small scales are read first."""
    steps = [step._replace(scale=None) for step in plan.steps if step.scale is not None]
    return _count_bytes(steps, plan.index.entries)


def row_count(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _count_bytes(steps: Iterable[Step], entries: Mapping[str, Entry]) -> int:
    total = 0
    for name, (lo, hi) in rows_needed(steps, entries).items():
        _, _, shape, _, start, stop = entries[name]
        total += (stop - start) * (hi - lo) // shape[0] if shape else stop - start
    return total
