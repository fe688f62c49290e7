"""The only place that sees both files and devices: run a plan, hand out the parameters.

`Loader.feed` is the one executor. It takes tensors in any order, whole or by runs of rows, over any number of calls,
from any number of threads (steps fill disjoint regions, which the plan proves, so there are no locks), and copies what
must wait, because callers reuse their buffers. The file reader is one feeder among others. `Weights` gives each
parameter out once. What is loaded from where is decided in plan/; how codes become numbers in kernels/reference.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.encoding import ENCODINGS
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

    def __init__(self, tensors: dict[str, Tensor], roundings: Iterable[Rounding] = ()):
        self._tensors = dict(tensors)
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
        scale = self.take(name + ".scale") if self.has(name + ".scale") else None
        return Matrix(data, scale, ENCODINGS[0].group)

    def finish(self) -> None:
        """Refuse parameters that were loaded and never taken."""
        if self._tensors:
            raise LoadError("loaded but never used: " + _fold(self._tensors))


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
        self._users: dict[str, list[str]] = defaultdict(list)  # scale -> the weights it belongs to
        for step in plan.steps:
            self._steps[step.source].append(step)
            if step.scale is not None and step.source not in self._users[step.scale]:
                self._users[step.scale].append(step.source)
        self._needed = rows_needed(plan.steps, plan.index.entries)
        self._fed: dict[str, list[Span]] = defaultdict(list)
        self._scales: dict[str, Tensor] = {}  # complete, or being filled
        self._waiting: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)  # weights whose scale has not come
        self._roundings: dict[str, float] = {}

    def feed(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Take rows [first_row, first_row + len) of the checkpoint tensor `name`; the caller may reuse the memory at
        once. Raises LoadError for a name the checkpoint does not have, another dtype or shape, or rows fed before."""
        entry = self.plan.index.entries.get(name)
        if entry is None:
            raise LoadError(f"{name} is not a tensor of {self.plan.index.root}")
        span = _accept(entry, tensor, first_row, self._fed[name])
        if name in self._users:
            self._hold_scale(entry, tensor, first_row)
        for step in self._steps.get(name, ()):
            if step.scale is None:
                self._run(step, tensor, first_row, None)
            elif self._is_complete(step.scale):
                self._run(step, tensor, first_row, self._scales[step.scale])
        waits = any(s.scale is not None and not self._is_complete(s.scale) for s in self._steps.get(name, ()))
        if waits:
            self._waiting[name].append((first_row, tensor.clone()))
        # Booked only after the work: a scale may go when all rows of its weight are booked.
        self._fed[name].append(span)
        if name in self._users and self._is_complete(name):
            for weight in self._users[name]:
                self._release(weight, name)
        elif not waits:
            for step in self._steps.get(name, ()):
                if step.scale is not None and self._is_complete(name):
                    self._scales.pop(step.scale, None)

    def finish(self) -> Weights:
        """The parameters; LoadError names every tensor that has not come, or not wholly."""
        missing = [name for name in self._needed if not self._is_complete(name)]
        if missing:
            raise LoadError(f"{len(missing)} tensor(s) have not come, or only in part: " + _fold(missing))
        targets, self._targets = self._targets, {}
        return Weights(targets, (Rounding(*item) for item in sorted(self._roundings.items())))

    def needed(self) -> list[RowRange]:
        """What to read for this rank, scales of dequantising steps first, so that files leave nothing waiting."""
        order = sorted(self._needed, key=lambda name: name not in self._users)
        return [RowRange(name, *self._needed[name]) for name in order]

    def scale_names(self) -> set[str]:
        """The scales that dequantising steps use, whole tensors of a few KB each."""
        return set(self._users)

    def _is_complete(self, name: str) -> bool:
        lo, hi = self._needed[name]
        return sum(max(0, min(b, hi) - max(a, lo)) for a, b in self._fed[name]) >= hi - lo

    def _hold_scale(self, entry: Entry, tensor: Tensor, first_row: int) -> None:
        if entry.name not in self._scales:
            self._scales[entry.name] = torch.empty(entry.shape, dtype=tensor.dtype, device=self._device)
        self._scales[entry.name][first_row : first_row + tensor.shape[0]].copy_(tensor)

    def _release(self, weight: str, scale: str) -> None:
        for first_row, rows in self._waiting.pop(weight, ()):
            for step in self._steps[weight]:
                self._run(step, rows, first_row, self._scales[scale])
        if self._is_complete(weight):
            self._scales.pop(scale, None)

    def _run(self, step: Step, tensor: Tensor, first_row: int, scale: Tensor | None) -> None:
        """Do the part of a step that these rows hold."""
        region = self._targets[step.target][tuple(slice(*span) for span in step.put)]
        if step.view is None:
            if region.ndim > len(step.take):  # an expert's place in its stack
                region = region[0]
            self._fill(region, step.take, step, tensor, first_row, scale)
            return
        height, (inner, columns) = step.view[1], step.take[1:]
        for head, region_of_head in zip(range(*step.take[0]), region, strict=True):
            take = ((head * height + inner[0], head * height + inner[1]), columns)
            self._fill(region_of_head, take, step, tensor, first_row, scale)

    def _fill(
        self, region: Tensor, take: Box, step: Step, tensor: Tensor, first_row: int, scale: Tensor | None
    ) -> None:
        """Rows of `tensor`, which begins at `first_row`, that lie in `take` go to their place in `region`."""
        lo, hi = max(take[0][0], first_row), min(take[0][1], first_row + tensor.shape[0])
        if lo >= hi:
            return
        region = region[lo - take[0][0] : hi - take[0][0]]
        rows = tensor[lo - first_row : hi - first_row]
        left = 0
        if len(take) == 2:
            left, right = take[1]
            rows = rows[:, left:right]
        if step.op in ("copy", "widen"):
            region.copy_(rows)
            return
        rows = rows.to(region.device)
        if step.op == "dequantize":
            assert scale is not None and step.group is not None
            rows = dequantize(rows, scale, step.group, origin=(lo, left))
        region.copy_(rows)
        if region.dtype != torch.float32:
            self._note_rounding(step.source, rows.float(), region)

    def _note_rounding(self, source: str, exact: Tensor, held: Tensor) -> None:
        largest, back = 0.0, held.float()
        if not torch.equal(back, exact):  # the usual case costs two passes, not six
            least = torch.finfo(torch.float32).tiny
            largest = float(((back - exact).abs_() / exact.abs().clamp_(min=least)).max())
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
    total, pieces = count_read_bytes(plan), list[int]()

    def note(piece: int) -> None:
        pieces.append(piece)  # atomic, as += is not
        if progress is not None:
            progress(sum(pieces), total)

    scales = loader.scale_names()
    ranges = loader.needed()
    with _one_thread_per_operation():
        for wanted in ([r for r in ranges if r.name in scales], [r for r in ranges if r.name not in scales]):
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


def _accept(entry: Entry, tensor: Tensor, first_row: int, fed: list[Span]) -> Span:
    """The rows that are being fed, or LoadError."""
    if tensor.dtype != TORCH_DTYPES.get(entry.dtype):
        raise LoadError(f"{entry.name} was fed as {tensor.dtype}, the plan was made for {entry.dtype}")
    span = (first_row, first_row + (tensor.shape[0] if tensor.ndim else 1))
    fits = tensor.ndim == len(entry.shape) and tuple(tensor.shape[1:]) == entry.shape[1:]
    if not fits or not 0 <= span[0] < span[1] <= row_count(entry):
        found = f"shape {list(tensor.shape)} at row {first_row}"
        raise LoadError(f"{entry.name} was fed with {found}, the plan was made for {list(entry.shape)}")
    if any(a < span[1] and span[0] < b for a, b in fed):
        raise LoadError(f"{entry.name} was fed twice (rows {span[0]} to {span[1]})")
    return span


def _fold(names: Iterable[str]) -> str:
    return "; ".join(fold(names))
