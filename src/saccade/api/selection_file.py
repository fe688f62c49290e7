"""Captured selections in a file, written as they come: many requests and long texts in bounded memory.

The file begins with a line of JSON. Records follow, one for each piece of a request that a step ran:

    5 u32, little-endian: request, first position, tokens, layers, bytes of what follows behind the counts
    u16 [layers, tokens]: how many places a row has; 0: every place up to its own
    u8: the gaps between the places of each row, in order; a gap of 255 or more is that many 255, then the rest

The first gap of a row is its first place; later ones count from the place before. So a place is the sum of the bytes up
to it, and bytes of 255 are no place. A later record of the same positions counts. A record of no layers has the tokens
of a request, u32 each; its first position is the number of those that were the prompt. A record of no tokens ends a
request; its first position is the number of positions that count. A file that was cut is right up to its last whole
record. Next: engine/steps/selections.py, whose parts these are.
"""

import json
import os
import stat
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from saccade.base.json_text import to_json
from saccade.base.printable import escape
from saccade.base.values import show
from saccade.errors import RequestError

if TYPE_CHECKING:
    from saccade.engine.steps.selections import SeenRows

RECORD_HEAD = struct.Struct("<5I")
FORMAT_KEY = "saccade_selections"
LONG_GAP = 255
MOST_PLACES = (1 << 16) - 1  # of a row
MOST_WAITING = 1 << 28  # bytes that wait to be written; a step waits for room
MOST_FIRST_LINE = 1 << 16  # bytes of the first line


class SelectionWriter:
    """A file that selections of several requests are written to, as steps bring them: packed by a thread of its own,
    beside the steps: 61 layers that select 2,048 places each take 0.4 ms."""

    def __init__(
        self, path: str | os.PathLike[str], requests: int, index_topk: int, asked_by: str = "capture_selection"
    ) -> None:
        """RequestError if it cannot be written, which begins with `asked_by`. What was there goes when a first step has
        brought something: a request that is refused loses nothing."""
        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"{asked_by}: expected a path, True or False, found {show(path)}")
        self.path, self.failure, self._asked_by = Path(path), "", asked_by
        if index_topk > MOST_PLACES:
            raise RequestError(f"{asked_by}: a file holds rows of up to {MOST_PLACES:,} places, found {index_topk:,}")
        self._room, self._waiting = Condition(), 0
        self._fault: BaseException | None = None  # of the thread, which is raised by `end`
        self._first_line = to_json({FORMAT_KEY: 1, "requests": requests, "index_topk": index_topk}).encode() + b"\n"
        self._is_begun, self._is_new = False, not os.path.lexists(self.path)
        try:
            self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115 - closed at the end of a `with` block
        except (OSError, ValueError) as error:
            raise RequestError(self._explain(error)) from None
        self._thread = ThreadPoolExecutor(1, "selections")

    def open_request(self, number: int) -> "RequestPart":
        return RequestPart(self, number)

    def _begin(self) -> None:
        """Now there is something to write: what was there goes."""
        if self._is_begun:
            return
        self._is_begun = True
        try:
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):  # not a pipe or a device
                self._file.truncate(0)
        except OSError as error:
            self.failure = self._explain(error)
        self._put(self._first_line)

    def hand_over(self, request: int, part: "SeenRows") -> None:
        """To the thread. Waits while too much waits already."""
        size = part.rows.nbytes
        with self._room:
            self._room.wait_for(lambda: not self._waiting or self._waiting + size <= MOST_WAITING)
            self._waiting += size
        self._thread.submit(self._take, request, part, size)

    def _take(self, request: int, part: "SeenRows", size: int) -> None:
        try:
            if self._fault is None and not self.failure:
                self.write(request, part)
        except BaseException as fault:
            self._fault = fault
        finally:
            with self._room:
                self._waiting -= size
                self._room.notify_all()

    def write(self, request: int, part: "SeenRows") -> None:
        """What some tokens select. A full disk fails no step: it is told at the end."""
        from saccade.engine.steps.selections import widen_places  # whose torch no reader needs

        rows = widen_places(part.rows).swapaxes(0, 1)  # [layers, tokens, K]
        layers, tokens = rows.shape[0], part.whole + rows.shape[1]
        found, gaps = pack_rows(rows, part.start + part.whole)
        counts = np.zeros((layers, tokens), found.dtype)  # 0: every place up to its own
        counts[:, part.whole :] = found.reshape(layers, -1)
        head = RECORD_HEAD.pack(request, part.start, tokens, layers, len(gaps))
        self._put(head + counts.astype("<u2").tobytes() + gaps.tobytes())

    def end(self, requests: "Sequence[KeptRequest]") -> None:
        """What each request was. RequestError if anything could not be written."""
        self._thread.shutdown()
        if self._fault is not None:
            raise self._fault
        self._begin()
        for number, (prompt, tokens) in enumerate(requests):
            raw = np.array(tokens, "<u4").tobytes()
            self._put(RECORD_HEAD.pack(number, prompt, len(tokens), 0, len(raw)) + raw)
            self._put(RECORD_HEAD.pack(number, max(len(tokens) - 1, 0), 0, 0, 0))
        try:
            self._file.flush()
        except OSError as error:
            self.failure = self.failure or self._explain(error)
        if self.failure:
            raise RequestError(self.failure)

    def __enter__(self) -> "SelectionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        with suppress(OSError):  # said by `end`; an error on the way counts more
            self._file.close()
        if self._is_new and not self._is_begun:
            with suppress(OSError):
                self.path.unlink()

    def _put(self, raw: bytes) -> None:
        self._begin()
        if self.failure:
            return
        try:
            self._file.write(raw)
        except OSError as error:
            self.failure = self._explain(error)

    def _explain(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or error
        return f"{self._asked_by}: {escape(str(self.path))} cannot be written: {reason}"


class KeptRequest(NamedTuple):
    """A request as it was: the last token was never run and has no row."""

    prompt: int  # tokens of it
    tokens: list[int]  # with those of the answer


class RequestPart(NamedTuple):
    """What an engine gives the selections of one request to, step by step."""

    writer: SelectionWriter
    number: int

    def append(self, part: "SeenRows") -> None:
        self.writer.hand_over(self.number, part)


class SelectionRecord(NamedTuple):
    """Where a piece of a request lies in the file."""

    start: int
    tokens: int
    layers: int
    at: int  # of its counts
    size: int  # bytes of its gaps


class SelectionReader:
    """A file of selections, at `path`. Only the heads of its records are read at first."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """RequestError for what is no such file."""
        self.path, self._records, self._ends = Path(path), dict[int, list[SelectionRecord]](), dict[int, int]()
        self._tokens: dict[int, SelectionRecord] = {}
        try:
            with self.path.open("rb") as file:
                self.about = self._read_head(file.readline(MOST_FIRST_LINE))
                self._index(file, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"{escape(str(self.path))} cannot be read as selections: {reason}") from None

    @property
    def requests(self) -> list[int]:
        """Those that have any rows, in order."""
        return sorted(self._records)

    def count_positions(self, request: int) -> int:
        """Positions of `request` that have rows."""
        last = max((r.start + r.tokens for r in self._records[request]), default=0)
        return min(last, self._ends.get(request, last))

    def read_tokens(self, request: int) -> KeptRequest:
        """What `request` asked and got. Raises RequestError where the file was cut before its end."""
        record = self._tokens.get(request)
        if record is None:
            raise RequestError(f"{escape(str(self.path))} was cut before the tokens of request {request}")
        with self.path.open("rb") as file:
            file.seek(record.at)
            tokens = np.frombuffer(file.read(record.size), "<u4")
        return KeptRequest(record.start, tokens.tolist())

    def read(self, request: int) -> np.ndarray:
        """What each position of `request` saw, i32 [layers, positions, K], ascending, -1 padded: as
        Completion.selections."""
        records, positions = self._records[request], self.count_positions(request)
        pieces = list[tuple[int, list[np.ndarray]]]()
        with self.path.open("rb") as file:
            for record in records:
                pieces.append((record.start, self._decode(file, record)))
        width = max((len(row) for _, rows in pieces for row in rows), default=0)
        found = np.full((records[0].layers, positions, width), -1, np.int32)
        for record, (start, rows) in zip(records, pieces, strict=True):
            for i, row in enumerate(rows):
                layer, place = divmod(i, record.tokens)
                if start + place < positions:
                    found[layer, start + place] = -1
                    found[layer, start + place, : len(row)] = row
        return found

    def _decode(self, file: BinaryIO, record: SelectionRecord) -> list[np.ndarray]:
        file.seek(record.at)
        counts = np.frombuffer(file.read(2 * record.layers * record.tokens), "<u2")
        gaps = np.frombuffer(file.read(record.size), np.uint8)
        return unpack_rows(counts, gaps, record.start, record.tokens)

    def _read_head(self, line: bytes) -> dict[str, Any]:
        values = json.loads(line) if line.startswith(b'{"' + FORMAT_KEY.encode()) else None
        if not isinstance(values, dict) or values.get(FORMAT_KEY) != 1:
            raise ValueError("it does not begin as such a file does")
        return values

    def _index(self, file: BinaryIO, size: int) -> None:
        while len(raw := file.read(RECORD_HEAD.size)) == RECORD_HEAD.size:
            request, start, tokens, layers, length = RECORD_HEAD.unpack(raw)
            at, whole = file.tell(), 2 * layers * tokens + length
            if at + whole > size:
                return  # cut
            record = SelectionRecord(start, tokens, layers, at, length)
            if not tokens:
                self._ends[request] = start
            elif not layers:
                self._tokens[request] = record
            else:
                self._records.setdefault(request, []).append(record)
            file.seek(whole, os.SEEK_CUR)


def pack_rows(part: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts [layers * tokens] and gaps of rows [layers, tokens, K], ascending, -1 padded, from position `start` on."""
    rows = part.reshape(-1, part.shape[2])
    is_there = rows >= 0
    counts = is_there.sum(1)
    own = np.tile(np.arange(start, start + part.shape[1]), part.shape[0])
    is_whole = counts == own + 1  # ascending, so every place up to its own
    is_there[is_whole] = False
    gaps = np.diff(rows, axis=1, prepend=0)[is_there]
    out = gaps.astype(np.uint8)
    large = np.flatnonzero(gaps >= LONG_GAP)  # few: a division of all would take longer than all else
    times, out[large] = np.divmod(gaps[large], LONG_GAP)
    return np.where(is_whole, 0, counts), np.insert(out, np.repeat(large, times), LONG_GAP)


def unpack_rows(counts: np.ndarray, gaps: np.ndarray, start: int, tokens: int) -> list[np.ndarray]:
    """The rows, each i32, layer by layer."""
    sums = np.cumsum(gaps, dtype=np.int64)[gaps < LONG_GAP]
    ends = np.cumsum(counts, dtype=np.int64)
    rows = list[np.ndarray]()
    before = 0  # the sum at the end of the row before
    for i, (count, end) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True)):
        if count == 0:
            rows.append(np.arange(start + i % tokens + 1, dtype=np.int32))
            continue
        row = sums[end - count : end] - before
        before = int(sums[end - 1])
        rows.append(row.astype(np.int32))
    return rows
