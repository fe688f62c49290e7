"""New weights into a running engine: a trainer's push, tensor by tensor, through the loader's own `feed`.

What will come is announced first, and proven like a checkpoint: every parameter of the running model, in the same dtype
and shape, from announced tensors alone. Only then a byte moves. Parameters keep their addresses, so whatever recorded
them (a CUDA graph) stays valid. Requests that are under way end on the old weights before a parameter changes. So no
answer comes from two sets of weights, and no page keeps what old weights computed. Next: weights/loader.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from saccade.api.loading.machine import find_free_bytes
from saccade.base.values import is_count, show
from saccade.checkpoint.header import AXES_LIMIT, BITS, NUMBER_LIMIT, Entry
from saccade.checkpoint.index import Index
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.engine.shared import SharedEngine
from saccade.errors import LoadError, PlanError, Problem, RankError
from saccade.models.parameters import Shape
from saccade.ops.device import on
from saccade.parallel.lead import Lead
from saccade.plan import make_plan, require
from saccade.plan.problems import show_problems
from saccade.plan.show import show_bytes
from saccade.plan.types import DTYPE_BYTES, Plan, Stored
from saccade.weights.loader import Loader
from saccade.weights.weights import Weights

Announced = Mapping[str, tuple[str, Shape]]  # tensor name -> dtype as safetensors spells it, shape
TORCH_SPELLING = {str(dtype).removeprefix("torch."): name for name, dtype in TORCH_DTYPES.items()}
PIECE_BYTES = 1 << 26  # of what is fed, that goes to other ranks in one message
STAGED_SHARE = 0.9  # of the free memory that a staged copy may take


class Push:
    """One push under way. Use it as a context manager: left without `finish`, it is abandoned.

    `is_staged`: the new weights wait beside the old ones until all have come. Otherwise they are written over them, and
    until a push has finished the engine refuses requests. Requests that come while those under way end wait for it.
    """

    def __init__(
        self,
        plan: Plan,
        held: Mapping[str, Tensor],
        shared: SharedEngine,
        free_bytes: int,
        staged: bool | None = None,
        announced: Announced | None = None,
    ):
        """`plan`: of the announced tensors, proven to hold what runs; `held`: the parameters of the model by name;
        `staged`: None decides by `free_bytes`; `announced`: for other ranks, to which all goes that is fed here."""
        self.plan, self._held, self._shared, self._engine = plan, held, shared, shared.engine
        self.is_staged = fits_staged(plan, free_bytes) if staged is None else staged
        self._is_open, self._ending = True, Lock()
        self._new: Weights | None = None
        self._free_bytes = free_bytes
        device = next(iter(held.values())).device
        self._loader = Loader(plan, device, None if self.is_staged else lambda stored, _: held[stored.name])
        opening = {"do": "push", "what": "open", "announced": announced, "staged": self.is_staged}
        if self.is_staged:
            self._tell(opening)
        else:
            with shared.drained():
                self._engine.scheduler.forget_prefixes()
                self._engine.tell(opening)
                self._engine.refusal = self._describe("in place has begun")
        self._engine.push = self

    def __str__(self) -> str:
        size, free = show_bytes(self.plan.device_bytes), show_bytes(self._free_bytes)
        return (
            f"{size} staged beside the old weights, {free} free" if self.is_staged else f"{size} in place, {free} free"
        )

    def feed(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Rows of an announced tensor, in any order, from any thread, as `Loader.feed` takes them. LoadError for what
        was not announced so; that tensor can be fed again, rightly."""
        self._require_open()
        with on(self._engine.device):
            self._loader.feed(name, tensor, first_row)
            if self._engine.has_others:
                for row, piece in cut_rows(tensor, first_row):
                    feed = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(piece.shape)}
                    self._tell({"do": "push", "what": "feed", "row": row} | feed, as_bytes(piece))

    def finish(self) -> None:
        """Let the new weights run. LoadError names every tensor that has not come; the push stays open then."""
        with self._ending:
            self._require_open()
            self._new = self._new or self._loader.finish()  # kept: what interrupts the drain must not cost the push
            if self.is_staged:
                with self._shared.drained(), torch.no_grad():
                    self._engine.tell({"do": "push", "what": "finish"})
                    self._engine.refusal = self._describe("was interrupted while it was copied")
                    self._engine.scheduler.forget_prefixes()
                    for name, tensor in self._new.held.items():
                        self._held[name].copy_(tensor)
            else:
                self._tell({"do": "push", "what": "finish"})
            self._engine.refusal = None
            if self._engine.causes is not None:
                self._engine.causes.forget()
            self._close()

    def abandon(self) -> None:
        """Drop the push. Staged, nothing has changed; in place, the engine refuses requests until another finishes."""
        with self._ending:
            if self._is_open:
                if not self.is_staged:
                    self._engine.refusal = self._describe("in place was abandoned")
                self._close()
                with suppress(RankError):  # they are gone
                    self._tell({"do": "push", "what": "abandon"})

    def __enter__(self) -> "Push":
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def _tell(self, head: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        with self._shared.turns.turn():
            self._engine.tell(head, payload)

    def _close(self) -> None:
        self._is_open = False
        self._engine.push = None
        self._new = None
        del self._loader

    def _require_open(self) -> None:
        if not self._is_open:
            raise LoadError("this push has ended; begin another one")

    def _describe(self, what: str) -> str:
        return (
            f"the weights are incomplete: a push of {len(self.plan.index.entries):,} tensors {what};"
            " push all of them again, to the end"
        )


def begin_push(
    running: Plan,
    held: Mapping[str, Tensor],
    shared: SharedEngine,
    lead: Lead | None,
    device: str,
    announced: Announced,
    staged: bool | None,
) -> Push:
    """A push into what runs on all ranks, `held` here and led by `lead`. As `LLM.push`, which has the same errors."""
    engine, claim = shared.engine, object()  # that no other thread begins one meanwhile
    try:
        with shared.turns.turn():
            if engine.push is not None:
                raise LoadError("a push is under way; finish or abandon it first")
            engine.push = claim
        plan, free = plan_push(running, announced), find_free_bytes(device)
        if lead is not None and staged is None:
            others = [reply.head["fits"] for reply in lead.ask({"do": "push", "what": "plan", "announced": announced})]
            staged = all([fits_staged(plan, free), *others])
        return Push(plan, held, shared, free, staged, announced)
    except BaseException:
        if engine.push is claim:
            engine.push = None
        raise


def fits_staged(plan: Plan, free_bytes: int) -> bool:
    """Whether memory holds the new weights beside the old ones."""
    return plan.device_bytes <= STAGED_SHARE * free_bytes


def cut_rows(tensor: Tensor, first_row: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of a tensor in pieces of at most PIECE_BYTES, or one row, and the number of the first of each."""
    if not tensor.ndim or tensor.nbytes <= PIECE_BYTES:
        yield first_row, tensor
        return
    rows = max(1, PIECE_BYTES // max(1, tensor[0].nbytes))
    for start in range(0, len(tensor), rows):
        yield first_row + start, tensor[start : start + rows]


def as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def plan_push(running: Plan, announced: Announced) -> Plan:
    """The plan of what was announced. PlanError, before anything changes, if it is not complete, not known, or would
    not hold exactly what runs."""
    entries, at = {}, 0
    for name, (dtype, shape) in check_announced(announced).items():
        size = prod(shape) * DTYPE_BYTES.get(dtype, 0)
        entries[name] = Entry(name, dtype, tuple(shape), "push", at, at + size)
        at += size
    index = Index("the push", (), entries, (), (), 0)
    plan = make_plan(running.config, index, running.layout, running.dtype, running.mtp)
    require(plan)
    problems = [*compare_stored(running.stored, plan.stored)]
    if problems:
        message = f"the push would not hold what runs\n{show_problems(problems)}"
        raise PlanError(message, tuple(problems))
    return plan


def check_announced(announced: Any) -> Announced:
    """What a caller announced, or a LoadError that says how it is done."""
    if not isinstance(announced, Mapping):
        raise LoadError(f"a push is announced as a mapping of names to (dtype, shape), found {show(announced)}")
    for name, spec in announced.items():
        if not isinstance(name, str):
            raise LoadError(f"a tensor is announced under {show(name)}; expected its name, a str")
        wanted = explain_spec(spec)
        if wanted is not None:
            raise LoadError(f"{name} is announced as {show(spec)}; expected {wanted}")
    return announced


def explain_spec(spec: object) -> str | None:
    """What was expected in place of a tensor's dtype and shape as announced; None if they are fine."""
    if not isinstance(spec, tuple | list) or len(spec) != 2 or not isinstance(spec[1], tuple | list):
        return 'a pair like ("BF16", (64, 128))'
    dtype, shape = spec
    if not isinstance(dtype, str) or dtype not in BITS:
        spelled = TORCH_SPELLING.get(str(dtype).removeprefix("torch."))
        examples = f'"{spelled}"' if spelled else '"BF16" or "F8_E4M3"'
        return f"a dtype as safetensors spells it, like {examples}"
    if len(shape) > AXES_LIMIT or not all(is_count(n, 0) for n in shape) or prod(shape) >= NUMBER_LIMIT:
        return f"a shape of at most {AXES_LIMIT} counts whose product is below 2^63, like (64, 128)"
    return None


def compare_stored(running: Mapping[str, Stored], pushed: Mapping[str, Stored]) -> list[Problem]:
    """What a push would hold otherwise than what runs."""
    problems = []
    for name in [*running, *(n for n in pushed if n not in running)]:
        old, new = running.get(name), pushed.get(name)
        if old != new:
            text = f"runs as {_show(old)}, the push would make it {_show(new)}; push tensors stored as those that run"
            problems.append(Problem("push", name, text))
    return problems


def _show(stored: Stored | None) -> str:
    if stored is None:
        return "nothing"
    return f"{stored.encoding.name if stored.encoding else stored.dtype} {list(stored.shape)}"
