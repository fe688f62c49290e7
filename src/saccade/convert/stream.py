"""The bytes of a conversion: rows are read, decoded or encoded, and written to their place, by several threads.

A file's header is known beforehand, so every piece has its place and pieces may come in any order. What is copied is
never decoded. Memory is threads x a few MiB, and of scales at most SCALE_BYTES at once. Knows no config and no model;
how codes become numbers is weights/dequantize.py. Next: convert.py, which calls this file by file.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.read import RowRange, read_rows, read_tensors
from saccade.checkpoint.write import quantize_blocks
from saccade.convert.changes import BLOCK_SIDE, Output, OutputTensor
from saccade.convert.place import Place, write_at
from saccade.errors import ContentsError
from saccade.inspect.contents import READ_BUFFER as SCAN_BUFFER
from saccade.inspect.contents import TEMPORARIES
from saccade.kernels.codes import read_scale
from saccade.weights.dequantize import decode_rows, measure_rounding
from saccade.weights.loader import one_thread_per_operation

# Bytes read at once. Their numbers in F32, their scales and products must stay in a core's cache: on one core FP8 is
# decoded in 2.8 ns a number in pieces of 256 Ki, in 3.6 of 1 Mi, in 6.4 to 8.9 of 4 Mi.
WRITE_BUFFER = 512 << 10
COPY_BUFFER = 4 << 20  # bytes copied at once
KEPT_BYTES = 31 << 20
HELD_SCALE_BYTES = 64 << 20  # of the scales that are held at once: those of 1 TB in FP8 128x128, of 0.5 GB in NVFP4
AT_ONCE = 4 << 30  # bytes whose pieces are listed together
SCALES_AT_ONCE = 64 << 10  # looked at; each takes 18 bytes meanwhile
EXACT = 2.0**-90  # codes times a power of two from here on are exact in BF16


@dataclass
class CopyTally:
    """What the threads have found out, under one lock."""

    read: int = 0  # bytes of tensors
    roundings: dict[str, float] = field(default_factory=dict)  # largest relative error by tensor; absent if exact
    not_finite: set[str] = field(default_factory=set)  # tensors that hold NaN or infinity, as their source does
    lock: threading.Lock = field(default_factory=threading.Lock)


# Bytes of temporaries per byte read: two 4-bit codes, each as index, number, scale and product in 4 bytes.
PER_BYTE = 48
PER_TENSOR = 2048  # bytes of the tables of contents
PER_PIECE = 400  # bytes of the list of what is read
PER_TEXT, PER_PARSED = 2, 24  # of JSON: as it is held, and while one file's is parsed or written
SLACK = 48 << 20  # the allocator's, and torch's tables

CopyProgress = Callable[[int], None]


def write_outputs(
    index: Index, outputs: Iterable[Output], place: Place, threads: int, tally: CopyTally, progress: CopyProgress
) -> None:
    """Write the files one after another. While one is brought to the disk and gets its name, the next is begun.

    LoadError if a source file cannot be read, OSError if the target cannot be written, ContentsError for numbers that
    the result cannot hold. Scales must be sound."""
    with ThreadPoolExecutor(1) as finisher, quick_operations():
        last: Future[None] | None = None
        for output in outputs:
            descriptor = place.create(output.name)
            try:
                fill_output(index, output, descriptor, threads, tally, progress)
                if last is not None:
                    last.result()
            except BaseException:
                os.close(descriptor)
                raise
            last = finisher.submit(place.finish, output.name, descriptor)
        if last is not None:
            last.result()


def memory_bound(index: Index, outputs: Iterable[Output], threads: int, json_bytes: int = 0) -> int:
    """Bytes that a conversion which writes these files may hold at once, beyond what the process had before.
    `json_bytes`: of the files of JSON beside them."""
    piece, scales, tensors = max(COPY_BUFFER, SCAN_BUFFER + TEMPORARIES), 0, len(index.entries)
    for output in outputs:
        tensors += len(output.items)
        for group in split_groups(index, output.items):
            row = max((i.source.stop - i.source.start) // max(i.source.shape[0], 1) for i in group)  # is never cut
            piece = max(piece, max(row, buffer_of(group)) * PER_BYTE)
            scales = max(scales, sum(e.stop - e.start for item in group for e in find_needed(index, item)))
    # What headers hold beside tensors of usual names: text that may fill 100 MB.
    texts = [max(0, file.header_bytes - file.tensors * PER_TENSOR // 4) for file in index.files]
    texts.append(max(0, json_bytes - tensors * PER_TENSOR // 4))
    pieces = min(AT_ONCE, max((file.size for file in index.files), default=0)) // WRITE_BUFFER * PER_PIECE
    return (
        threads * piece
        + 3 * scales
        + tensors * PER_TENSOR
        + sum(texts) * PER_TEXT
        + max(texts) * PER_PARSED
        + pieces
        + SLACK
    )


def fill_output(
    index: Index, output: Output, descriptor: int, threads: int, tally: CopyTally, progress: CopyProgress
) -> None:
    """Write all bytes of one file."""
    written = [0] if output.whole else [write_at(descriptor, output.header, 0)]

    def note(count: int) -> None:
        with tally.lock:
            tally.read += count
        progress(count)

    if output.whole:
        spans = [Entry(output.name, "U8", (output.size,), output.name, 0, output.size)]
        copy(index, spans, [0], descriptor, threads, written, tally, note)
    else:
        copied = [item for item in output.items if item.op == "copy"]
        spans = [i.source._replace(dtype="U8", shape=(i.source.stop - i.source.start,)) for i in copied]
        copy(index, spans, [i.start for i in copied], descriptor, threads, written, tally, note)
        work = Work(index, output, descriptor, written, tally)
        for group in split_groups(index, output.items):
            work.scales = read_partners(index, group, threads, note)
            ranges = [RowRange(item.source.name, 0, item.source.shape[0]) for item in group]
            for batch in split_blocks(index, ranges):
                read_rows(index, batch, work.convert, threads, buffer_of(group), note)
    if written[0] != output.size:
        raise AssertionError(f"{output.name}: {written[0]} bytes written, {output.size} planned")


def copy(
    index: Index,
    spans: list[Entry],
    places: list[int],
    descriptor: int,
    threads: int,
    written: list[int],
    tally: CopyTally,
    progress: CopyProgress,
) -> None:
    """Bytes as they are, whatever they mean."""
    to = {entry.name: place for entry, place in zip(spans, places, strict=True)}

    def put(name: str, rows: Tensor, first: int) -> None:
        count = write_at(descriptor, rows.numpy().data, to[name] + first)
        with tally.lock:
            written[0] += count

    bytes_only = replace(index, entries={entry.name: entry for entry in spans})
    ranges = [RowRange(entry.name, 0, entry.shape[0]) for entry in spans]
    for batch in split_blocks(bytes_only, ranges):
        read_rows(bytes_only, batch, put, threads, COPY_BUFFER, progress)


@dataclass
class Work:
    """One file's tensors that change, and where their bytes go."""

    index: Index
    output: Output
    descriptor: int
    written: list[int]
    tally: CopyTally
    scales: dict[str, Tensor] = field(default_factory=dict)  # by name, whole
    exact: dict[str, bool] = field(default_factory=dict)  # by tensor, once it has been looked at

    def __post_init__(self) -> None:
        self.items = {i.source.name: i for i in self.output.items if i.op not in ("copy", "scale")}
        self.scale_items = {i.source.name: i for i in self.output.items if i.op == "scale"}

    def convert(self, name: str, rows: Tensor, first: int) -> None:
        """Turn rows [first, first + len) of a source tensor into what the result holds, and write that."""
        item = self.items[name]
        if item.op == "quantize":
            try:
                codes, scale = quantize_blocks(rows)
            except ValueError as e:
                raise ContentsError(f"{name}: {e} (rows {first} to {first + len(rows)})") from None
            self.put(item, codes, first)
            self.put(self.scale_items[name], scale, first // BLOCK_SIDE)
            return
        numbers = rows.float() if item.coding is None else decode_rows(item.coding, rows, self.partners_of(item), first)
        held = numbers.bfloat16()
        if not held.sum(dtype=torch.float32).isfinite() and not held.isfinite().all():  # the sum is the cheap half
            if (held.isinf() & numbers.isfinite()).any():
                raise ContentsError(f"{name}: exceeds the range of BF16 (rows {first} to {first + len(rows)})")
            with self.tally.lock:
                self.tally.not_finite.add(name)
        if item.op == "round" or not self.is_exact(item):
            self.note_rounding(name, numbers, held)
        self.put(item, held, first)

    def put(self, item: OutputTensor, rows: Tensor, first: int) -> None:
        row_bytes = (item.stop - item.start) // item.shape[0]
        raw = rows.contiguous().view(torch.uint8).flatten().numpy().data
        count = write_at(self.descriptor, raw, item.start + first * row_bytes)
        with self.tally.lock:
            self.written[0] += count

    def is_exact(self, item: OutputTensor) -> bool:
        """Whether FP8 codes have power-of-two scales, whose product BF16 holds exactly: no need to look."""
        coding = item.coding
        if coding is None or coding.encoding.code != "e4m3":
            return False
        if coding.codes not in self.exact:
            parts = self.scales[coding.scale].flatten().split(SCALES_AT_ONCE)
            self.exact[coding.codes] = all(map(are_powers, parts))
        return self.exact[coding.codes]

    def partners_of(self, item: OutputTensor) -> list[Tensor]:
        assert item.coding is not None
        return [self.scales[name] for name in item.coding.partners]

    def note_rounding(self, name: str, exact: Tensor, held: Tensor) -> None:
        largest = measure_rounding(exact, held)
        if largest > 0:
            with self.tally.lock:
                self.tally.roundings[name] = max(self.tally.roundings.get(name, 0.0), largest)


def are_powers(scale: Tensor) -> bool:
    """Whether scales are powers of two, not too small for products that BF16 holds exactly."""
    numbers = read_scale(scale)
    return bool((numbers.frexp().mantissa == 0.5).all() and (numbers >= EXACT).all())


def find_needed(index: Index, item: OutputTensor) -> list[Entry]:
    """The tensors without which an item's codes mean nothing, whichever file they are in."""
    return [] if item.coding is None else [index.entries[name] for name in item.coding.partners]


def split_groups(index: Index, items: Iterable[OutputTensor]) -> Iterator[list[OutputTensor]]:
    """The items that change, in runs whose scales have SCALE_BYTES at most."""
    group: list[OutputTensor] = []
    held = 0
    for item in items:
        if item.op in ("copy", "scale"):
            continue
        size = sum(e.stop - e.start for e in find_needed(index, item))
        if group and held + size > HELD_SCALE_BYTES:
            yield group
            group, held = [], 0
        group.append(item)
        held += size
    if group:
        yield group


def split_blocks(index: Index, ranges: Iterable[RowRange]) -> Iterator[list[RowRange]]:
    """The same rows in runs of AT_ONCE bytes, cut between blocks: each piece of a run stands in a list while it is
    read, in 0.4 kB, which are 0.6 GB for one file of 700."""
    batch: list[RowRange] = []
    held = 0
    for name, first, last in ranges:
        entry = index.entries[name]
        row = max((entry.stop - entry.start) // max(entry.shape[0], 1), 1)
        step = max(AT_ONCE // row // BLOCK_SIDE, 1) * BLOCK_SIDE
        for start in range(first, last, step):
            stop = min(start + step, last)
            if batch and held + (stop - start) * row > AT_ONCE:
                yield batch
                batch, held = [], 0
            batch.append(RowRange(name, start, stop))
            held += (stop - start) * row
    if batch:
        yield batch


def read_partners(index: Index, group: list[OutputTensor], threads: int, progress: CopyProgress) -> dict[str, Tensor]:
    """What a group's codes need, whole."""
    wanted = dict.fromkeys(entry.name for item in group for entry in find_needed(index, item))
    return read_tensors(index, wanted, threads, COPY_BUFFER, progress)


def buffer_of(group: list[OutputTensor]) -> int:
    """Bytes to read at once. Pieces of a tensor that is encoded hold whole blocks of rows, so 128 rows must fit."""
    rows = [BLOCK_SIDE * (i.source.stop - i.source.start) // i.source.shape[0] for i in group if i.op == "quantize"]
    return max([WRITE_BUFFER, *rows])


@contextmanager
def quick_operations() -> Iterator[None]:
    """One thread an operation, as in loading, and freed memory is kept for the next piece: glibc takes the largest
    block it has seen freed, up to 32 MiB, for the size from which a block goes back to the kernel. Without
    this 1.3 GB of FP8 cost 1.1 million page faults and 12 s, not 4 s."""
    torch.empty(KEPT_BYTES, dtype=torch.uint8)
    with one_thread_per_operation():
        yield
