"""What a conversion did, as data. Knows no file and no torch. Next: cli/convert.py, which prints it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from saccade.convert.changes import Mode, Output


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: str
    source: str
    mode: Mode
    files: int  # with tensors
    kept_files: int  # of them from an earlier run
    others: tuple[str, ...]  # files copied as they are
    dropped: tuple[str, ...]  # files that describe a quantisation which is no more
    left_out: tuple[str, ...]  # tensors beside the model that are not part of it; hidden folders
    whole: dict[str, int]  # files with tensors in which nothing changes, by how they are there: hard, sym, copy
    whole_bytes: int
    tensors: tuple[int, int]  # before, after
    size: int  # bytes of the result's tensor files
    changes: dict[str, int]  # tensors by what became of them
    roundings: dict[str, float]  # tensors that were rounded in this run, with the largest relative error
    warnings: tuple[str, ...]  # what other engines may not take as it is, a line each
    notes: tuple[str, ...]  # what the file system lacks, a line each
    not_finite: tuple[str, ...]  # of those written in this run, tensors that hold NaN or infinity
    seconds: float
    threads: int
    memory_bound: int  # bytes that may be held at once, beyond what the process had before


def count_changes(outputs: Iterable[Output]) -> dict[str, int]:
    """Tensors of the result by what they were and are: "FP8 128x128 -> BF16", "copied"."""
    counts: Counter[str] = Counter()
    for output in outputs:
        for item in output.items:
            before = item.coding.encoding.name if item.coding else item.source.dtype
            if item.op == "quantize":
                counts[f"{before} -> FP8 128x128"] += 1
            elif item.op != "scale":
                counts["copied" if item.op == "copy" else f"{before} -> {item.dtype}"] += 1
    return dict(sorted(counts.items()))
