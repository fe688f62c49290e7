"""Every byte of a checkpoint looked at once: `saccade check --contents` and `--sha256`.

The loader's reader reads each tensor as flat bytes, so memory is threads x buffer whatever its shape. scan.py
says what a run of bytes holds, judge.py what that means. Next: show.py.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from saccade.base.limits import THREAD_LIMIT, count_cpus
from saccade.base.values import is_count, show
from saccade.checkpoint.encoding import weight_of
from saccade.checkpoint.index import Entry, File, Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.checkpoint.starts import UNFINISHED
from saccade.config.file import Config
from saccade.errors import LoadError, Problem, RequestError
from saccade.inspect.digests import Digests, compare_digests, find_extra, hash_file, read_digests, size_of
from saccade.inspect.findings import Contents, Upcast
from saccade.inspect.judge import Judge
from saccade.inspect.scan import (
    FLOAT_BITS,
    INTEGERS,
    SCALE_DTYPES,
    Marks,
    merge_marks,
    scan_codes,
    scan_exponents,
    scan_scales,
    scan_values,
)
from saccade.inspect.stored import Codings, is_scale
from saccade.inspect.upcasts import BYTES_PER_NUMBER, judge_upcast

READ_BUFFER = 4 << 20  # of one thread; larger ones do not stay in the processor's cache
TEMPORARIES = 4 << 20  # of one thread, see CHUNK in scan.py and PIECE in blocks.py
LIBRARIES = 16 << 20  # code of torch and numpy that is paged in on its first use counts as memory, too
WK = ".indexer.wk.weight"

ReadProgress = Callable[[int, int], None]


def check_contents(
    config: Config,
    index: Index,
    scan: bool = True,
    listing: str | None = None,
    threads: int | None = None,
    progress: ReadProgress | None = None,
    is_directory: bool = True,
) -> Contents:
    """Scan all tensors, if `scan` and the files are sound; compare the digests in the file `listing`, if it is given.

    `threads` is up to 8 unless given; `is_directory`: whether all of the directory is the model. CheckpointError if
    `listing` cannot be used, LoadError if a file cannot be read to its end.
    """
    if threads is not None and not (is_count(threads, 1) and threads <= THREAD_LIMIT):
        wanted = f"an integer of at least 1 and at most {THREAD_LIMIT}"
        raise RequestError(f"threads: expected {wanted}, found {show(threads)}")
    start = time.perf_counter()
    threads = threads or min(8, count_cpus())
    given = {} if listing is None else read_digests(listing)
    do_scan = scan and all(problem.kind == UNFINISHED for problem in index.problems)
    judge = Judge(Codings.of(config, index), config.scale_fmt)
    pass_ = _Pass(judge, threads, progress)
    upcasts: list[Upcast] = []
    if do_scan:
        pass_.scan(index.entries.values(), do_hash=bool(given))
        judge.judge_suspects()
        upcasts = report_upcasts(judge)
    elif scan:
        judge.notes.append(Problem("not-read", index.root, "has unsound files: mend them, then look at what they hold"))
    if listing is not None:
        judge.problems += compare_digests(index, given, pass_.hash_others(given))
        judge.notes += find_extra(index, is_directory, given, listing)
    place = {name: i for i, name in enumerate(index.entries)}
    wk = (entry for name, entry in index.entries.items() if (weight_of(name) or name).endswith(WK))
    widest = max((entry.stop - entry.start for entry in wk), default=0)
    return Contents(
        problems=tuple(sorted(judge.problems, key=lambda p: (p.kind, place.get(p.name, 0), p.name, p.text))),
        notes=tuple(sorted(judge.notes, key=lambda p: (p.kind, place.get(p.name, 0), p.name, p.text))),
        upcasts=tuple(upcasts),
        was_scanned=do_scan,
        digests=None if listing is None else sum(pass_.digests.get(name) == digest for name, digest in given.items()),
        read_bytes=pass_.done,
        seconds=time.perf_counter() - start,
        threads=threads,
        memory_bytes=threads * (READ_BUFFER + TEMPORARIES) + BYTES_PER_NUMBER * widest + LIBRARIES,
    )


def judge_scales(config: Config, index: Index, names: Iterable[str], threads: int) -> list[Problem]:
    """What `check_contents` would call a problem of these scales and offsets, which it takes from sound files."""
    judge = Judge(Codings.of(config, index), config.scale_fmt)
    _Pass(judge, threads, None).scan([index.entries[name] for name in names], do_hash=False)
    judge.judge_suspects()
    place = {name: i for i, name in enumerate(index.entries)}
    return sorted(judge.problems, key=lambda p: (p.kind, place[p.name], p.text))


def report_upcasts(judge: Judge) -> list[Upcast]:
    """What BF16 makes of each indexer's `wk`, the MTP layer's too. Named is one that cannot be decoded, and one that is
    not finite for no reason that has been named; left out is one in which something is wrong."""
    upcasts, index = [], judge.codings.index
    accused = {weight_of(problem.name) or problem.name for problem in judge.problems}
    for name in dict.fromkeys(weight_of(name) or name for name in index.entries):
        if not name.endswith(WK):
            continue
        read = judge.codings.read_matrix(name)
        if read is None:
            entry = next(entry for n, entry in index.entries.items() if (weight_of(n) or n) == name)
            text = f"is stored as {judge.codings.name_of(entry)}: its upcast to BF16 is not measured"
            judge.notes.append(Problem("not-judged", name, text))
        elif name in accused:
            continue  # nothing can be said of an upcast of wrong numbers
        elif (upcast := judge_upcast(name, read[1], read[0])) is not None:
            upcasts.append(upcast)
        else:
            judge.problems.append(
                Problem("not-finite", name, "exceeds the range of BF16, in which the engine holds it")
            )
    return upcasts


@dataclass
class _Tally:
    """What is known of a tensor of which `left` bytes are still to come."""

    left: int
    marks: Marks = field(default_factory=dict)


class _Pass:
    """One reading of all files."""

    def __init__(self, judge: Judge, threads: int, progress: ReadProgress | None):
        self.judge, self.threads, self.progress = judge, threads, progress
        self.codings, self.index = judge.codings, judge.codings.index
        self.digests: dict[str, str | Problem] = {}
        self.done = self.total = 0
        self._is_stopped = False
        self._tallies: dict[str, _Tally] = {}
        self._lock = threading.Lock()

    def scan(self, entries: Iterable[Entry], do_hash: bool) -> None:
        """Look at tensors. Threads share a file; or, to hash it from front to back, each has a file of its own, all of
        whose tensors must be given."""
        by_file: dict[str, list[Entry]] = {file.name: [] for file in self.index.files}
        for entry in entries:
            if entry.stop > entry.start:
                by_file[entry.file].append(entry)
                self.total += entry.stop - entry.start
        if not do_hash:
            for of_file in by_file.values():
                self._read(of_file, self._look, self.threads)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            jobs = [pool.submit(self._hash, file, by_file[file.name]) for file in self.index.files]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self._is_stopped = True
                pool.shutdown(cancel_futures=True)
                raise

    def _read(self, entries: list[Entry], consume: Callable[[str, Tensor, int], None], threads: int) -> None:
        """Feed the bytes of some tensors of one file, in order if by one thread."""
        flat = {e.name: e._replace(dtype="U8", shape=(e.stop - e.start,)) for e in entries}
        ranges = [RowRange(name, 0, e.shape[0]) for name, e in flat.items()]
        read_rows(replace(self.index, entries=flat), ranges, consume, threads, READ_BUFFER, self._note)

    def _hash(self, file: File, entries: list[Entry]) -> None:
        """Look at a file's tensors and hash it. They tile it, after its header: else the index had a problem."""
        digest = hashlib.sha256()
        try:
            with open(os.path.join(self.index.root, file.name), "rb") as f:
                digest.update(f.read(file.header_bytes))
        except OSError as e:
            raise LoadError(f"{file.name}: cannot be read: {e.strerror} (in {self.index.title})") from e

        def consume(name: str, rows: Tensor, first: int) -> None:
            digest.update(rows.numpy().data)
            self._look(name, rows, first)

        self._read(entries, consume, 1)
        self.digests[file.name] = digest.hexdigest()

    def hash_others(self, given: Digests) -> dict[str, str | Problem]:
        """The digests of the given files, of those that were not scanned as well."""
        rest = [name for name in given if name not in self.digests]
        self.total += sum(size_of(Path(self.index.root, name)) or 0 for name in rest)
        with ThreadPoolExecutor(self.threads) as pool:
            found = pool.map(lambda name: hash_file(self.index.root, name, self._note), rest)
            self.digests.update(zip(rest, found, strict=True))
        return self.digests

    def _note(self, count: int) -> None:
        if self._is_stopped:
            raise LoadError("stopped")  # another thread's error is the one that is told
        with self._lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _look(self, name: str, rows: Tensor, first: int) -> None:
        """Scan some bytes of a tensor; with its last ones, judge it."""
        entry, raw = self.index.entries[name], rows.numpy()
        marks: Marks = {}
        if is_scale(entry):
            if entry.dtype in SCALE_DTYPES:
                marks = scan_scales(raw, entry.dtype, first)
            elif (grid := self.codings.find_exponents(entry)) is not None:
                marks = scan_exponents(raw, first, grid[1], (entry.stop - entry.start) // grid[0])
        elif (code := self.codings.find_nibbles(entry)) is not None:
            marks = scan_codes(raw, code)
        elif entry.dtype in FLOAT_BITS or entry.dtype in INTEGERS:
            marks = scan_values(raw, entry.dtype, first)
        with self._lock:
            tally = self._tallies.setdefault(name, _Tally(entry.stop - entry.start))
            merge_marks(tally.marks, marks)
            tally.left -= len(raw)
            if tally.left == 0:
                del self._tallies[name]
                self.judge.judge(entry, tally.marks)
