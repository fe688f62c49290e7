"""What the layers of a step select, on its way to those who asked for it.

A position below the width of a row sees every place up to its own, or nothing where its numbers are not finite: of such
rows one number a layer is copied, of others the row. Of a prompt of 2,200 tokens, 12 layers and 2,048 places that is
7.5 MB instead of 108. Copied behind the choice of tokens, not waited for, and handed over while the device computes the
next step. Knows tensors and positions, no model. Next: graphs.py records, engine.py hands over.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, groupby
from threading import Thread
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.reference import select_all
from saccade.ops.step import Batch

T = TypeVar("T")

NONE_NARROW = (1 << 16) - 1  # what -1 is in 16 bits; places below it fit as well
LARGE_STEP = 256  # tokens of a step from which on memory counts: 4,096 of DeepSeek-V3.2 select 2 GB as i32
LARGE_PART = 1 << 22  # bytes that a thread copies: new memory takes 0.3 ms a MB, a step of one token 1 ms
# Of a device's memory for graphs, in all: 4,297 tokens of DeepSeek-V3.2 (61 layers, 2,048 places of 16 bits).
PLACE_BYTES = 1 << 30
LEAST_PLACE = 64  # tokens; where there is no memory for so many, steps that give selections are not captured


class SeenRows(NamedTuple):
    """What some tokens of one request select, one after the other."""

    start: int  # position of the first
    whole: int  # how many, from the first on, see every place up to their own
    rows: "np.ndarray[Any, Any]"  # u16 or i32 [tokens - whole, layers, K] of those behind, for `widen_places`

    def cut(self, tokens: int) -> "SeenRows":
        """The first `tokens` of them."""
        whole = min(self.whole, tokens)
        return SeenRows(self.start, whole, self.rows[: tokens - whole])


class SelectionParts(Protocol):
    """What takes the selections of a request, step by step: a list, or a file."""

    def append(self, part: SeenRows, /) -> None:
        """Its rows lie among those of others. A list copies them."""


class HeldParts(list[SeenRows]):
    """The selections of a request, in memory: copies, so that the rows of others go, and the pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self._copying: Thread | None = None  # one large part at a time

    def append(self, part: SeenRows, /) -> None:
        self._wait()
        super().append(part)
        if part.rows.nbytes < LARGE_PART:
            self._copy(len(self) - 1)
        else:
            self._copying = Thread(target=self._copy, args=[len(self) - 1])
            self._copying.start()

    def _copy(self, place: int) -> None:
        start, whole, rows = self[place]
        self[place] = SeenRows(start, whole, rows.copy())

    def _wait(self) -> None:
        if self._copying is not None:
            self._copying.join()
            self._copying = None

    def join(self, end: int, first: int = 0) -> Tensor:
        """i32 [layers, positions, K], -1 padded: of positions from `first` on, before `end` at most."""
        self._wait()
        layers, width = (self[0].rows.shape[1], max(part.rows.shape[2] for part in self)) if self else (0, 0)
        end = min(end, max((part.start + part.whole + len(part.rows) for part in self), default=0))
        seen = torch.full((layers, max(0, end - first), width), -1, dtype=torch.int32)
        known = torch.arange(first, max(first, min(end, width)))
        seen[:, : len(known)] = select_all(known, width)
        for start, whole, rows in self:  # what was computed again after a preemption is the same again
            begin = start + whole
            part = torch.from_numpy(widen_places(rows[max(0, first - begin) : max(0, end - begin)])).transpose(0, 1)
            place = max(0, begin - first)
            seen[:, place : place + part.shape[1]] = -1
            seen[:, place : place + part.shape[1], : part.shape[2]] = part
        return seen


class StepPiece(NamedTuple):
    """Of a step: the tokens of one request."""

    start: int  # position of the first
    size: int
    is_wanted: bool


class StepSelections(list[Tensor]):
    """What the layers of a step select: a list of them, until all are together in `packed`."""

    def __init__(self, batch: Batch, memory: Tensor | None = None, layers: int = 0) -> None:
        """`memory`: i16, flat, where those of all `layers` will be together, if they fit."""
        self._positions, self.is_narrow = batch.positions, batch.page_table.shape[1] * PAGE <= NONE_NARROW
        self._memory, self._layers = memory, layers
        self._place: Tensor | None = None  # `packed`, while it is filled
        self.packed: Tensor | None = None  # i16 or i32 [T, layers, K]
        self._pieces = list[tuple[StepPiece, int]]()  # of the step, each with how many of its rows may be whole
        self._ends = self._rows = torch.empty(0)  # on the host: of rows that may be whole their last place; others
        self._copied: torch.cuda.Event | None = None
        self._takers = list[tuple[int, SelectionParts, int]]()  # piece, who takes it, up to which position

    @property
    def width(self) -> int:
        """Places of a row."""
        return self[0].shape[1] if self.packed is None else self.packed.shape[2]

    def append(self, selection: Tensor, /) -> None:
        """One layer's, i32 [T, K]. In a large step each is made small at once; else all together, in one launch."""
        if self._memory is not None and not self:
            self._place = self._find_place(self._memory, selection)
        if len(selection) > LARGE_STEP:
            if self._place is not None:
                selection = self._place[:, len(self)].copy_(selection)
            elif self.is_narrow:
                selection = selection.to(torch.int16)
        super().append(selection)

    def _find_place(self, memory: Tensor, selection: Tensor) -> Tensor | None:
        shape = len(selection), self._layers, selection.shape[1]
        size = shape[0] * shape[1] * shape[2] * (1 if self.is_narrow else 2)
        if size > len(memory):
            return None
        return (memory if self.is_narrow else memory.view(torch.int32))[: shape[0] * shape[1] * shape[2]].view(shape)

    def pack(self) -> None:
        """All layers have come. Those with a place are there now."""
        if self._place is None:
            return
        if len(self._place) <= LARGE_STEP:
            self._place.copy_(torch.stack(list(self), 1))
        self.packed = self._place
        self.clear()

    def adopt(self, found: "StepSelections") -> None:
        """What a graph left, or its first run."""
        self.packed = found.packed
        self.extend(found)

    def send(self, pieces: Sequence[StepPiece]) -> None:
        """Begin to copy what is wanted of the step's pieces. Behind what the step has launched."""
        width = self.width
        self._pieces = [(piece, min(piece.size, max(0, width - piece.start))) for piece in pieces]
        sizes = list(chain.from_iterable((whole, piece.size - whole) for piece, whole in self._pieces))
        wanted = [piece.is_wanted for piece in pieces]
        none = [False] * len(wanted)
        ends = [self._take_ends(*span) for span in list_spans(sizes, [*chain(*zip(wanted, none, strict=True))])]
        rows = [self._take_rows(*span) for span in list_spans(sizes, [*chain(*zip(none, wanted, strict=True))])]
        nothing = self._take_rows(0, 0)
        self._ends, self._rows = copy_to_host(ends or [nothing[..., 0]]), copy_to_host(rows or [nothing])
        if nothing.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self.packed = self._place = None
        self.clear()

    def _take_ends(self, first: int, end: int) -> Tensor:
        """[end - first, layers]: place number p of the row of position p: p, if the row has every place up to it."""
        at = self._positions[first:end, None]
        if self.packed is not None:
            found = self.packed[first:end]
            return found.gather(2, at[..., None].expand(-1, found.shape[1], 1))[..., 0]
        return self._narrow(torch.stack([layer[first:end].gather(1, at)[:, 0] for layer in self], 1))

    def _take_rows(self, first: int, end: int) -> Tensor:
        """[end - first, layers, K]."""
        if self.packed is not None:
            return self.packed[first:end]
        return self._narrow(torch.stack([layer[first:end] for layer in self], 1))

    def _narrow(self, places: Tensor) -> Tensor:
        return places.to(torch.int16) if self.is_narrow else places

    def note(self, piece: int, parts: SelectionParts, end: int) -> None:
        """A piece is for `parts`, once it is there: what lies before position `end`."""
        self._takers.append((piece, parts, end))

    def hand_over(self) -> None:
        """What was noted. The copy is waited for; behind the next step's launch it has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        pieces = self.read()
        for place, parts, end in self._takers:
            piece = pieces[place]
            if piece is not None:
                parts.append(piece.cut(max(0, end - piece.start)))
        self._takers.clear()

    def read(self) -> list[SeenRows | None]:
        """Each piece that was wanted."""
        dtype = np.uint16 if self.is_narrow else np.int32
        ends, rows, found = self._ends.numpy().view(dtype), self._rows.numpy().view(dtype), list[SeenRows | None]()
        last = row = 0
        for piece, whole in self._pieces:
            if not piece.is_wanted:
                found.append(None)
                continue
            first, last = last, last + whole
            begin, row = row, row + piece.size - whole
            own = rows[begin:row]
            if whole:
                is_whole = ends[first:last] == np.arange(piece.start, piece.start + whole, dtype=dtype)[:, None]
                if not is_whole.all():
                    own, whole = np.concatenate([fill_rows(is_whole, piece.start, rows), own]), 0
            found.append(SeenRows(piece.start, whole, own))
        return found


def fill_rows(is_whole: "np.ndarray[Any, Any]", start: int, like: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """[tokens, layers, K] of tokens from position `start` on, whose rows [tokens, layers] have every place up to their
    own, or none: its numbers were not finite (`select` in kernels/reference.py)."""
    place = np.arange(like.shape[2])
    own = np.arange(start, start + len(is_whole))[:, None]
    is_seen = is_whole[..., None] & (place <= own)[:, None]
    return np.where(is_seen, place, -1).astype(like.dtype)


def copy_to_host(parts: Sequence[Tensor]) -> Tensor:
    """The parts, one after the other; on a GPU not waited for."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    is_pinned = whole.is_cuda and whole.numel() > 0
    return torch.empty(whole.shape, dtype=whole.dtype, pin_memory=is_pinned).copy_(whole, non_blocking=True)


class SelectionPlace:
    """Device memory where all graphs of a model leave what their steps select, one after the other: a graph of 256
    tokens that kept it for itself would take 128 MB with DeepSeek-V3.2."""

    def __init__(self, tokens: int) -> None:
        """`tokens`: of the largest step that is captured."""
        self._tokens = tokens
        self._memory: Tensor | None = None
        self._layers = self._width = 0
        self._is_refused = False  # by the device, which has no memory left

    def has_room(self, batch: Batch) -> bool:
        """Whether a step's selections have a place. The first step, which is not recorded, shows how large it is."""
        if self._memory is None:
            return not self._is_refused
        numbers = 1 if batch.page_table.shape[1] * PAGE <= NONE_NARROW else 2
        return len(batch.tokens) * self._layers * self._width * numbers <= len(self._memory)

    def run(self, batch: Batch, step: Callable[[StepSelections], T]) -> tuple[T, StepSelections]:
        """What `step` returns, and what it appends."""
        found = StepSelections(batch, self._memory, self._layers)
        result = step(found)
        found.pack()
        if self._memory is None and not self._is_refused:
            self._allocate(found)
        return result, found

    def _allocate(self, found: StepSelections) -> None:
        """As much as there is memory for, before anything is recorded: a step's first run is not."""
        self._layers, self._width = len(found), found.width
        tokens = min(self._tokens, PLACE_BYTES // (2 * self._layers * self._width))
        while self._memory is None and tokens >= LEAST_PLACE:
            try:
                size = tokens * self._layers * self._width
                self._memory = torch.empty(size + size % 2, dtype=torch.int16, device=found[0].device)
            except torch.cuda.OutOfMemoryError:
                tokens //= 2
        self._is_refused = self._memory is None


def list_spans(sizes: Sequence[int], is_wanted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First token and end of runs of pieces that are wanted; pieces of no tokens part no run."""
    ends = [0, *accumulate(sizes)]
    for wanted, run in groupby((i for i, size in enumerate(sizes) if size), lambda i: is_wanted[i]):
        places = list(run)
        if wanted:
            yield ends[places[0]], ends[places[-1] + 1]


def widen_places(rows: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """i32, -1 padded, of what SeenRows has."""
    if rows.dtype != np.uint16:
        return rows
    wide = rows.astype(np.int32)
    wide[wide == NONE_NARROW] = -1
    return wide
