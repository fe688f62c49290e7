"""Run a plan, then hand out the parameters. The only place that sees both files and devices.

`Loader.feed` is the one executor. It takes tensors in any order, whole or by runs of rows, over any number of calls,
from any number of threads (steps fill disjoint regions, which the plan proves, so numbers move without a lock), and
copies what must wait, because callers reuse their buffers. The file reader is one feeder among others. What is
loaded from where is decided in plan/. Next: load_step.py, what one step does with numbers; weights.py, what comes out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock

import torch
from torch import Tensor

from saccade.checkpoint.index import Entry
from saccade.checkpoint.read import TORCH_DTYPES, RowRange, read_rows
from saccade.checkpoint.staging import memory_for
from saccade.errors import LoadError, PlanError
from saccade.models.parameters import Span
from saccade.parallel.abreast import Abreast
from saccade.plan import check, require
from saccade.plan.fold import fold
from saccade.plan.problems import show_problems
from saccade.plan.reads import count_read_bytes, row_count, rows_needed
from saccade.plan.types import LoadStep, Plan, Stored
from saccade.weights.load_step import Rows, run_load_step
from saccade.weights.weights import Rounding, Weights

Allocate = Callable[[Stored, torch.device], Tensor]


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
        self._steps: dict[str, list[LoadStep]] = defaultdict(list)
        self._partners: dict[str, tuple[str, ...]] = {}  # the scales of tensors that are dequantised
        for step in plan.steps:
            self._steps[step.source].append(step)
            if step.coding is not None:
                self._partners[step.source] = step.coding.partners
        self._codes_of = {partner: codes for codes, partners in self._partners.items() for partner in partners}
        self._zeros = frozenset(plan.zeros)
        self._needed = rows_needed(plan.steps, plan.index.entries, plan.zeros)
        self._left = {name: hi - lo for name, (lo, hi) in self._needed.items()}  # rows that are not yet in their place
        self._fed: dict[str, list[Span]] = defaultdict(list)
        self._scales: dict[str, Tensor] = {}  # from a scale's first row until its codes are done
        self._waiting: dict[str, list[Rows]] = defaultdict(list)  # codes whose scales are not complete
        self._roundings: dict[str, float] = {}
        self._is_finished = False
        self._lock = Lock()  # around bookkeeping only: numbers are moved and multiplied outside it

    @torch.no_grad()
    def feed(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Take rows [first_row, first_row + len) of the checkpoint tensor `name`; the caller may reuse the memory at
        once. Raises LoadError for a name the checkpoint does not have, another dtype or shape, or rows fed before."""
        entry = self.plan.index.entries.get(name)
        if entry is None:
            raise LoadError(f"{name} is not a tensor of {self.plan.index.title}")
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise LoadError(f"{name} was fed as {type(tensor).__name__}; expected a torch tensor with its numbers")
        rows = Rows(tensor, first_row)
        with self._lock:
            if self._is_finished:
                raise LoadError(f"{name} was fed after finish()")
            span = _accept(entry, rows, self._fed[name])
            self._fed[name].append(span)
        try:
            self._take(entry, rows)
        except BaseException:  # what did not arrive may be fed again
            with self._lock:
                self._fed[name].remove(span)
            raise

    def _take(self, entry: Entry, rows: Rows) -> None:
        name = entry.name
        if self._count_needed(name, rows) == 0:
            return  # another rank's, or ignored
        if name in self._zeros:
            self._take_zeros(name, rows)
        elif name in self._codes_of:
            self._take_scale(entry, rows)
        elif name in self._partners:
            self._take_codes(name, rows)
        else:
            self._place(name, rows)

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
        return Weights(targets, (Rounding(*item) for item in sorted(self._roundings.items())), self.plan.stored)

    def needed(self) -> tuple[list[RowRange], list[RowRange]]:
        """What to read for this rank: the scales of dequantising steps, a few KB each, and what must hold zeros, then
        the rest. In this order nothing waits."""
        first = self._codes_of.keys() | self._zeros
        ranges = [RowRange(name, *span) for name, span in self._needed.items()]
        return [r for r in ranges if r.name in first], [r for r in ranges if r.name not in first]

    def _take_zeros(self, name: str, rows: Rows) -> None:
        if bool((rows.tensor.float() != 0).any()):  # as float: not every device compares FP8
            raise LoadError(
                f"{name} is not zero: its codes are asymmetric, which is not supported; expected zeros, found up to"
                f" {float(rows.tensor.float().abs().max())}. Get a symmetric conversion"
            )
        with self._lock:
            self._left[name] -= rows.last - rows.first

    def _take_scale(self, entry: Entry, rows: Rows) -> None:
        with self._lock:
            if entry.name not in self._scales:
                dtype = rows.tensor.dtype
                shape = entry.shape or (1,)  # one scale, of a whole matrix, has a row too
                self._scales[entry.name] = torch.empty(shape, dtype=dtype, device=self._device)
            scale = self._scales[entry.name]
        scale[rows.first : rows.last].copy_(rows.tensor)
        codes = self._codes_of[entry.name]
        with self._lock:
            self._left[entry.name] -= rows.last - rows.first
            released = [] if self._lacks_scale(codes) else self._waiting.pop(codes, [])
        for waited in released:
            self._place(codes, waited)

    def _take_codes(self, name: str, rows: Rows) -> None:
        if self._lacks_scale(name):
            kept = Rows(rows.tensor.clone(), rows.first)
            with self._lock:
                if self._lacks_scale(name):  # still
                    self._waiting[name].append(kept)
                    return
        self._place(name, rows)

    def _lacks_scale(self, codes: str) -> bool:
        return any(self._left[partner] for partner in self._partners[codes])

    def _place(self, name: str, rows: Rows) -> None:
        """Do what the steps do with these rows, and let their scales go after the last of them."""
        partners = self._partners.get(name, ())
        scales = [self._scales[partner] for partner in partners]
        roundings = [run_load_step(step, self._targets[step.target], rows, scales) for step in self._steps[name]]
        measured = [r for r in roundings if r is not None]
        with self._lock:
            if measured:
                self._roundings[name] = max(self._roundings.get(name, 0.0), *measured)
            self._left[name] -= self._count_needed(name, rows)
            if self._left[name] == 0:
                for partner in partners:
                    del self._scales[partner]

    def _count_needed(self, name: str, rows: Rows) -> int:
        lo, hi = self._needed.get(name, (0, 0))
        return max(0, min(hi, rows.last) - max(lo, rows.first))


def load(
    plan: Plan,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    allocate: Allocate | None = None,
    abreast: Abreast | None = None,
) -> Weights:
    """Prove the plan, then load it from its files. `progress` is told the bytes done and the bytes in all, by any of
    the threads. `abreast`: the other ranks of this host that read the same files now. On a GPU, files' bytes are copied
    there as they are, through pinned memory, and decoded there.

    Raises PlanError before a tensor byte is read if any rank of the layout has an open problem."""
    require(plan)
    loader = Loader(plan, device, allocate)
    total, done, lock = count_read_bytes(plan), 0, Lock()
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    threads, memory = threads or count_threads(device), memory_for(device)

    def note(piece: int) -> None:
        nonlocal done
        with lock:
            done += piece
            if progress is not None:
                progress(done, total)

    with one_thread_per_operation(), abreast or nullcontext():
        scales, rest = loader.needed()
        for wanted, reach in ((scales, None), (rest, None if abreast is None else abreast.reach)):
            read_rows(plan.index, wanted, loader.feed, threads=threads, progress=note, memory=memory, reach=reach)
            if is_gpu:  # what some threads' work left there, others' reads next
                torch.cuda.synchronize(device)
    if is_gpu:
        torch.cuda.empty_cache()  # the pieces' memory, for the cache of tokens
    return loader.finish()


def count_threads(device: str | torch.device) -> int:
    """How many read, if nobody says: two keep two cores busy where they copy and decode as well, which a GPU does."""
    return 4 if torch.device(device).type == "cuda" else 2


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
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
