"""The only place that sees both files and devices: run a plan, hand out the parameters.

`Loader.feed` is the one executor. It takes tensors in any order, whole or by runs of rows, over any number of calls,
from any number of threads (steps fill disjoint regions, which the plan proves, so numbers move without a lock), and
copies what must wait, because callers reuse their buffers. The file reader is one feeder among others. `Weights` gives
each parameter out once. What is loaded from where is decided in plan/; how codes become numbers in reference.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.index import Entry
from saccade.checkpoint.read import TORCH_DTYPES, RowRange, read_rows
from saccade.errors import LoadError, PlanError
from saccade.kernels.matrix import Matrix
from saccade.kernels.reference import dequantize
from saccade.plan import check, require
from saccade.plan.fold import fold
from saccade.plan.reads import count_read_bytes, row_count, rows_needed
from saccade.plan.show import show_problems
from saccade.plan.types import Box, Plan, Span, Step, Stored

Allocate = Callable[[Stored, torch.device], Tensor]


class Rounding(NamedTuple):
    """How exactly a tensor became BF16. 0.0 means bit for bit: codes times power-of-two scales always are."""

    tensor: str
    largest: float  # relative to the exact value; at most 2**-8 of it, half a unit in BF16's last place


class Weights:
    """Loaded parameters, each to be taken once."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        roundings: Iterable[Rounding] = (),
        groups: Mapping[str, tuple[int, int]] | None = None,
    ):
        """`groups`: of the matrices kept as codes, how many rows and columns share a scale."""
        self.held = dict(tensors)  # all of them, taken or not: a push writes there
        self._tensors = dict(tensors)
        self._groups = dict(groups or {})
        self._taken: set[str] = set()
        self.roundings = tuple(roundings)

    def names(self) -> list[str]:
        """What has not been taken yet."""
        return list(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        """The parameter `name`, which nobody else can take any more."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            why = "was taken before" if name in self._taken else "was not loaded"
            raise LoadError(f"parameter {name} {why}; the model and plan/table.py disagree")
        self._taken.add(name)
        return tensor

    def matrix(self, name: str) -> Matrix:
        """The matrix `name`, as it is stored: plain, or codes with their scale."""
        data = self.take(name)
        if name not in self._groups:
            return Matrix(data)
        return Matrix(data, self.take(name + ".scale"), self._groups[name])

    def finish(self) -> None:
        """Refuse parameters that were loaded and never taken."""
        if self._tensors:
            raise LoadError("loaded but never used: " + _fold(self._tensors))


class Rows(NamedTuple):
    """A run of rows of a checkpoint tensor."""

    tensor: Tensor
    first: int

    @property
    def last(self) -> int:
        return self.first + (len(self.tensor) if self.tensor.ndim else 1)


class Loader:
    """Runs a plan on whatever tensors it is fed. Nothing outside it changes before `finish` hands over the Weights."""

    def __init__(self, plan: Plan, device: str | torch.device = "cpu", allocate: Allocate | None = None):
        """Refuses (PlanError) a plan with an open problem. `allocate(stored, device)` may bring the memory."""
        problems = check(plan)
        if problems:
            raise PlanError(show_problems(problems), tuple(problems))
        self.plan = plan
        self._device = torch.device(device)
        allocate = allocate or _allocate
        self._targets = {s.name: allocate(s, self._device) for s in plan.stored.values()}
        self._steps: dict[str, list[Step]] = defaultdict(list)
        self._scale_of: dict[str, str] = {}  # of the tensors that are dequantised
        for step in plan.steps:
            self._steps[step.source].append(step)
            if step.scale is not None:
                self._scale_of[step.source] = step.scale
        self._weight_of = {scale: weight for weight, scale in self._scale_of.items()}
        self._needed = rows_needed(plan.steps, plan.index.entries)
        self._left = {name: hi - lo for name, (lo, hi) in self._needed.items()}  # rows that are not yet in their place
        self._fed: dict[str, list[Span]] = defaultdict(list)
        self._scales: dict[str, Tensor] = {}  # from a scale's first row until its weight is done
        self._waiting: dict[str, list[Rows]] = defaultdict(list)  # weights whose scale is not complete
        self._roundings: dict[str, float] = {}
        self._is_finished = False
        self._lock = Lock()  # around bookkeeping only: numbers are moved and multiplied outside it

    @torch.no_grad()
    def feed(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Take rows [first_row, first_row + len) of the checkpoint tensor `name`; the caller may reuse the memory at
        once. Raises LoadError for a name the checkpoint does not have, another dtype or shape, or rows fed before."""
        entry = self.plan.index.entries.get(name)
        if entry is None:
            raise LoadError(f"{name} is not a tensor of {self.plan.index.root}")
        rows = Rows(tensor, first_row)
        with self._lock:
            if self._is_finished:
                raise LoadError(f"{name} was fed after finish()")
            self._fed[name].append(_accept(entry, rows, self._fed[name]))
        if self._count_needed(name, rows) == 0:
            return  # another rank's, or ignored
        if name in self._weight_of:
            self._take_scale(entry, rows)
        elif name in self._scale_of:
            self._take_codes(name, rows)
        else:
            self._place(name, rows, None)

    def finish(self) -> Weights:
        """The parameters; LoadError names every tensor that has not come, or not wholly."""
        with self._lock:
            if self._is_finished:
                raise LoadError("finish() was called twice: the parameters were handed over the first time")
            missing = [name for name, left in self._left.items() if left]
            if missing:
                raise LoadError(f"{len(missing)} tensor(s) have not come, or only in part: {_fold(missing)}")
            self._is_finished = True
        targets, self._targets = self._targets, {}
        groups = {s.name: s.group for s in self.plan.stored.values() if s.group is not None}
        return Weights(targets, (Rounding(*item) for item in sorted(self._roundings.items())), groups)

    def needed(self) -> tuple[list[RowRange], list[RowRange]]:
        """What to read for this rank: the scales of dequantising steps, a few KB each, then the rest. In this order
        nothing waits."""
        scales = [RowRange(name, *self._needed[name]) for name in self._weight_of]
        return scales, [RowRange(name, *span) for name, span in self._needed.items() if name not in self._weight_of]

    def _take_scale(self, entry: Entry, rows: Rows) -> None:
        with self._lock:
            if entry.name not in self._scales:
                dtype = rows.tensor.dtype
                self._scales[entry.name] = torch.empty(entry.shape, dtype=dtype, device=self._device)
            scale = self._scales[entry.name]
        scale[rows.first : rows.last].copy_(rows.tensor)
        weight = self._weight_of[entry.name]
        with self._lock:
            self._left[entry.name] -= rows.last - rows.first
            released = self._waiting.pop(weight, []) if self._left[entry.name] == 0 else []
        for waited in released:
            self._place(weight, waited, scale)

    def _take_codes(self, name: str, rows: Rows) -> None:
        scale = self._scale_of[name]
        if self._left[scale]:
            kept = Rows(rows.tensor.clone(), rows.first)
            with self._lock:
                if self._left[scale]:  # still
                    self._waiting[name].append(kept)
                    return
        self._place(name, rows, self._scales[scale])

    def _place(self, name: str, rows: Rows, scale: Tensor | None) -> None:
        """Do what the steps do with these rows, and let the scale go after the last of them."""
        for step in self._steps[name]:
            self._run(step, rows, scale)
        with self._lock:
            self._left[name] -= self._count_needed(name, rows)
            if self._left[name] == 0 and scale is not None:
                del self._scales[self._scale_of[name]]

    def _count_needed(self, name: str, rows: Rows) -> int:
        lo, hi = self._needed.get(name, (0, 0))
        return max(0, min(hi, rows.last) - max(lo, rows.first))

    def _run(self, step: Step, rows: Rows, scale: Tensor | None) -> None:
        """Do the part of a step that these rows hold."""
        region = self._targets[step.target][tuple(slice(*span) for span in step.put)]
        if step.view is None:
            if region.ndim > len(step.take):  # an expert's place in its stack
                region = region[0]
            self._fill(region, step.take, step, rows, scale)
            return
        height, (inner, columns) = step.view[1], step.take[1:]
        for head, region_of_head in zip(range(*step.take[0]), region, strict=True):
            take = ((head * height + inner[0], head * height + inner[1]), columns)
            self._fill(region_of_head, take, step, rows, scale)

    def _fill(self, region: Tensor, take: Box, step: Step, rows: Rows, scale: Tensor | None) -> None:
        """Those of the rows that lie in the box `take` go to their place in `region`."""
        lo, hi = max(take[0][0], rows.first), min(take[0][1], rows.last)
        if lo >= hi:
            return
        region = region[lo - take[0][0] : hi - take[0][0]]
        numbers = rows.tensor[lo - rows.first : hi - rows.first]
        left = 0
        if len(take) == 2:
            left, right = take[1]
            numbers = numbers[:, left:right]
        if step.op in ("copy", "widen"):
            region.copy_(numbers)
            return
        numbers = numbers.to(region.device)
        if step.op == "dequantize":
            assert scale is not None and step.group is not None
            numbers = dequantize(numbers, scale, step.group, origin=(lo, left))
        region.copy_(numbers)
        if region.dtype != torch.float32:
            self._note_rounding(step.source, numbers.float(), region)

    def _note_rounding(self, source: str, exact: Tensor, held: Tensor) -> None:
        largest, back = 0.0, held.float()
        if not torch.equal(back, exact):  # the usual case costs two passes, not six
            least = torch.finfo(torch.float32).tiny
            largest = float(((back - exact).abs_() / exact.abs().clamp_(min=least)).max())
        with self._lock:
            self._roundings[source] = max(self._roundings.get(source, 0.0), largest)


def load(
    plan: Plan,
    device: str | torch.device = "cpu",
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
    allocate: Allocate | None = None,
) -> Weights:
    """Prove the plan, then load it from its files. `progress` is told the bytes done and the bytes in all, by any of
    the threads.

    Raises PlanError before a tensor byte is read if any rank of the layout has an open problem."""
    require(plan)
    loader = Loader(plan, device, allocate)
    total, done, lock = count_read_bytes(plan), 0, Lock()

    def note(piece: int) -> None:
        nonlocal done
        with lock:
            done += piece
            if progress is not None:
                progress(done, total)

    with _one_thread_per_operation():
        for wanted in loader.needed():
            read_rows(plan.index, wanted, loader.feed, threads=threads, progress=note)
    return loader.finish()


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """The readers are the threads. Were each copy split over more, they would wait for each other: on two cores that
    others use too, 2.7 GB took 45 s instead of 9 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _allocate(stored: Stored, device: torch.device) -> Tensor:
    return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device=device)


def _accept(entry: Entry, rows: Rows, fed: list[Span]) -> Span:
    """The rows that are being fed, or LoadError."""
    tensor, span = rows.tensor, (rows.first, rows.last)
    if tensor.dtype != TORCH_DTYPES.get(entry.dtype):
        raise LoadError(f"{entry.name} was fed as {tensor.dtype}, the plan was made for {entry.dtype}")
    fits = tensor.ndim == len(entry.shape) and tuple(tensor.shape[1:]) == entry.shape[1:]
    if not fits or not 0 <= rows.first < rows.last <= row_count(entry):
        found = f"shape {list(tensor.shape)} at row {rows.first}"
        raise LoadError(f"{entry.name} was fed with {found}, the plan was made for {list(entry.shape)}")
    if any(a < rows.last and rows.first < b for a, b in fed):
        raise LoadError(f"{entry.name} was fed twice (rows {rows.first} to {rows.last})")
    return span


def _fold(names: Iterable[str]) -> str:
    return "; ".join(fold(names))
