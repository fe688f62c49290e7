"""What one rank reads, in bytes: the runs of rows that its steps touch, and what may have to wait in memory.

Files are read by rows (a run of rows is one span of the file), so a step that takes some columns reads whole rows.
Pure arithmetic on a Plan; who reads is checkpoint/read.py.
"""

from collections.abc import Iterable, Mapping
from math import prod

from saccade.checkpoint.index import Entry
from saccade.models.parameters import Span
from saccade.plan.types import LoadStep, Plan


def rows_needed(steps: Iterable[LoadStep], entries: Mapping[str, Entry], zeros: Iterable[str] = ()) -> dict[str, Span]:
    """For each tensor that is read, the run of rows from the first to the last that a step touches. The scales of a
    dequantising step are read whole, they have a few KB, and so is what must hold zeros."""
    needed: dict[str, Span] = {}
    for _, _, _, source, take, view, coding in steps:
        lo, hi = take[0] if take else (0, 1)
        if view is not None and len(view) > 2:  # the first axis counts heads, which are runs of rows
            lo, hi = lo * view[1], hi * view[1]
        before = needed.get(source)
        needed[source] = (lo, hi) if before is None else (min(lo, before[0]), max(hi, before[1]))
        if coding is not None:
            needed.update((name, (0, row_count(entries[name]))) for name in coding.partners)
    needed.update((name, (0, row_count(entries[name]))) for name in zeros)
    return needed


def count_read_bytes(plan: Plan) -> int:
    """Bytes of tensor data that loading this rank reads from its files."""
    return _count_bytes(rows_needed(plan.steps, plan.index.entries, plan.zeros), plan.index.entries)


def count_needed_bytes(plan: Plan) -> int:
    """Of `count_read_bytes`, those that a step uses: less than all where ranks share a matrix by columns."""
    entries, total, whole = plan.index.entries, 0.0, set[str]()
    for _, _, _, source, take, view, coding in plan.steps:
        entry = entries[source]
        counted = view or (coding.shape if coding else entry.shape)
        total += (entry.stop - entry.start) * prod(hi - lo for lo, hi in take) / max(1, prod(counted))
        whole.update(coding.partners if coding else ())
    whole.update(plan.zeros)
    return round(total) + sum(entries[name].stop - entries[name].start for name in whole)


def count_waiting_bytes(plan: Plan) -> int:
    """The most that may wait for a partner when tensors are fed in the worst order: every dequantised tensor before
    its scale. Files leave nothing waiting, because their small scales are read first."""
    steps = [step._replace(coding=None) for step in plan.steps if step.coding is not None]
    return _count_bytes(rows_needed(steps, plan.index.entries), plan.index.entries)


def row_count(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _count_bytes(needed: Mapping[str, Span], entries: Mapping[str, Entry]) -> int:
    total = 0
    for name, (lo, hi) in needed.items():
        _, _, shape, _, start, stop = entries[name]
        total += (stop - start) * (hi - lo) // shape[0] if shape else stop - start
    return total
