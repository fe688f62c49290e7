"""Tensor bytes out of files: runs of rows, read in file order through a few reusable buffers.

Neighbours are read together, large tensors by pieces, so memory is threads x buffer however large the checkpoint.
Plain pread, no mapping of files: a mapped file that was cut short reads as zeros. Knows no plan and no model. Whoever
takes a piece (weights/loader.py, Loader.feed) copies what it keeps. Which rows to read is decided in plan/reads.py.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.base.disk import advise_sequential
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.staging import Buffer, Memory
from saccade.errors import LoadError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

GAP = 64 << 10  # bytes not wanted that are cheaper to read than to seek over
WAIT = 0.1  # seconds until the readers are counted again
ROW_STEP = 128  # pieces of a tensor begin on the border of a scale block

Consume = Callable[[str, Tensor, int], None]


class RowRange(NamedTuple):
    """Rows of a tensor along its first axis. A scalar has one row."""

    name: str
    first_row: int
    last_row: int  # exclusive


class RowPiece(NamedTuple):
    """Rows that are handed over at once."""

    entry: Entry
    first_row: int
    rows: int
    start: int  # in the file
    stop: int


class FileSpan(NamedTuple):
    """Bytes of a file that are read at once, and the pieces in them."""

    file: str
    start: int
    stop: int
    pieces: list[RowPiece]


def read_rows(
    index: Index,
    ranges: Iterable[RowRange],
    consume: Consume,
    threads: int = 2,
    buffer_bytes: int = 4 << 20,
    progress: Callable[[int], None] | None = None,
    memory: Callable[[int], Memory] = Buffer,
    reach: Callable[[int], None] | None = None,
) -> None:
    """Call `consume(name, rows, first_row)` for every range, in pieces, from `threads` threads at once.

    `rows` is [n, ...] (or [] for a scalar) in the dtype of the file, a view of a buffer: it is valid during the call
    only. `memory(size)` makes each thread's, which may deliver to a device. `progress` is told the bytes of the pieces
    consumed. `reach(position)` is called before bytes are read, and may wait; positions count bytes from the beginning
    of the first file, as if all files were one. LoadError if a file cannot be read or has become shorter than its
    header says; an error in one thread stops all, and the first is raised.

    4 MiB stay in the cache between read and copy: on two cores 1.0 GB of FP8 came at 1.02 times the speed of a plain
    sequential read into fresh memory with 4 MiB, 0.91 with 8 and 0.86 with 32 (one thread: 0.56 at best).
    """
    spans = join_spans(split_ranges(index, ranges, buffer_bytes), buffer_bytes)
    size = max((s.stop - s.start for s in spans), default=0)
    begins = find_beginnings(index) if reach is not None else {}
    queue = iter(spans)  # next() on a list's iterator is atomic: each span goes to one thread
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Reader(index.root, memory(size)) as reader:
                while not failures and (span := next(queue, None)) is not None:
                    if reach is not None:
                        reach(begins[span.file] + span.start)
                    reader.read(span)
                    for piece in span.pieces:
                        consume(piece.entry.name, reader.tensor(piece, span), piece.first_row)
                    if progress is not None:
                        progress(sum(p.stop - p.start for p in span.pieces))
        except BaseException as e:  # raised again below, in the caller's thread
            failures.append(e)

    # Ctrl-C stops all too, wherever it comes, but nobody may still write when the caller goes on. So helpers are
    # counted: an interrupted join() takes its thread for ended (Python 3.11), an interrupted get() may have taken its
    # item, an interrupted start() may have started its thread.
    begun, ended, closed = list[None](), list[None](), list[None]()
    woken: SimpleQueue[None] = SimpleQueue()

    def help_out() -> None:
        begun.append(None)
        if not closed:
            work()
        ended.append(None)
        woken.put(None)

    try:
        for _ in range(min(threads, len(spans)) - 1):
            threading.Thread(target=help_out, daemon=True).start()
        work()
    except BaseException as e:
        failures.append(e)
    while True:
        try:
            closed.append(None)  # who has not begun yet, does nothing
            while len(ended) < len(begun):
                with suppress(Empty):
                    woken.get(timeout=WAIT)
            break
        except KeyboardInterrupt as e:
            failures.append(e)
    if failures:
        raise failures[0]


def find_beginnings(index: Index) -> dict[str, int]:
    """Where each file begins if all of them, in the order in which they are read, are one."""
    files = sorted((file.name, file.size) for file in index.files)
    sizes = accumulate((size for _, size in files), initial=0)
    return {name: start for (name, _), start in zip(files, sizes, strict=False)}


def read_tensors(
    index: Index,
    names: Iterable[str],
    threads: int = 1,
    buffer_bytes: int = 4 << 20,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Whole tensors by name, each as it is stored, in memory of its own. Arguments and errors: as for `read_rows`."""
    entries = [index.entries[name] for name in names]
    pieces: dict[str, list[tuple[int, Tensor]]] = {entry.name: [] for entry in entries}
    ranges = [RowRange(e.name, 0, e.shape[0] if e.shape else 1) for e in entries]
    read_rows(index, ranges, lambda name, rows, first: pieces[name].append((first, rows.clone())), threads,
              buffer_bytes, progress)  # fmt: skip
    tensors = {}
    for entry in entries:
        found = [rows for _, rows in sorted(pieces[entry.name], key=lambda piece: piece[0])]
        pieces[entry.name].clear()  # only one tensor is there twice
        if not found:  # no rows: nothing was read
            found = [torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])]
        tensors[entry.name] = found[0] if len(found) == 1 else torch.cat(found)
    return tensors


class Reader:
    """One thread's open file and its memory."""

    def __init__(self, root: str, memory: Memory):
        self.root, self.memory = root, memory
        self.file = ""
        self.descriptor = -1
        self.bytes = torch.empty(0, dtype=torch.uint8)  # of the last span, where they are used

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_file()
        self.memory.close()

    def close_file(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def read(self, span: FileSpan) -> None:
        """Get the span's bytes to where they are used."""
        try:
            if span.file != self.file:
                self.close_file()
                self.descriptor = os.open(os.path.join(self.root, span.file), os.O_RDONLY | os.O_CLOEXEC)
                self.file = span.file
                advise_sequential(self.descriptor)  # doubles the kernel's read-ahead
            done, size = 0, span.stop - span.start
            with self.memory.claim() as view:
                while done < size:
                    count = os.preadv(self.descriptor, [view[done:size]], span.start + done)
                    if count == 0:
                        break
                    done += count
        except OSError as e:
            raise LoadError(f"{span.file}: cannot be read: {e.strerror} (in {self.root})") from e
        if done < size:
            raise LoadError(
                f"{span.file}: ends at byte {span.start + done:,}, but tensors go to byte {span.stop:,}: it has become"
                " shorter since its header was read; download it again"
            )
        self.bytes = self.memory.deliver(size)

    def tensor(self, piece: RowPiece, span: FileSpan) -> Tensor:
        """A piece of the span that was read, as [rows, ...]."""
        dtype = TORCH_DTYPES[piece.entry.dtype]
        raw = self.bytes[piece.start - span.start : piece.stop - span.start]
        if raw.storage_offset() % dtype.itemsize:  # files need not align tensors; a copy is aligned
            raw = raw.clone()
        return raw.view(dtype).view((piece.rows, *piece.entry.shape[1:]) if piece.entry.shape else ())


def split_ranges(index: Index, ranges: Iterable[RowRange], buffer_bytes: int) -> Iterator[RowPiece]:
    """Cut every range into pieces that fit into the buffer; a single row is never cut."""
    for name, first, last in ranges:
        entry = index.entries.get(name)
        if entry is None:
            raise LoadError(f"{name} is not a tensor of {index.title}")
        if entry.dtype not in TORCH_DTYPES:
            raise LoadError(f"{name} is stored as {entry.dtype}, which cannot be read")
        count = entry.shape[0] if entry.shape else 1
        if not 0 <= first <= last <= count:
            raise LoadError(f"{name} has {count} rows; rows {first} to {last} were asked for")
        row_bytes = (entry.stop - entry.start) // max(count, 1)
        step = max(buffer_bytes // max(row_bytes, 1), 1)
        if step > ROW_STEP:
            step -= step % ROW_STEP
        while first < last:
            stop = min((first // step + 1) * step, last)
            start = entry.start + first * row_bytes
            yield RowPiece(entry, first, stop - first, start, start + (stop - first) * row_bytes)
            first = stop


def join_spans(pieces: Iterable[RowPiece], buffer_bytes: int) -> list[FileSpan]:
    """Pieces in file order, neighbours together while they fit into the buffer."""
    spans: list[FileSpan] = []
    for piece in sorted(pieces, key=lambda p: (p.entry.file, p.start, p.stop)):
        last = spans[-1] if spans else None
        if (
            last is not None
            and last.file == piece.entry.file
            and piece.start - last.stop <= GAP
            and max(piece.stop, last.stop) - last.start <= buffer_bytes
        ):
            last.pieces.append(piece)
            spans[-1] = last._replace(stop=max(piece.stop, last.stop))
        else:
            spans.append(FileSpan(piece.entry.file, piece.start, piece.stop, [piece]))
    return spans
