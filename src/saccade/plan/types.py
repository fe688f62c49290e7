"""The words of a load plan, as plain data.

A `Part` says: take this box of that checkpoint tensor, put it at that box of this parameter. A `Param` is what the
model wants: a name, a kind, a shape and its parts. A `Plan` is what the loader does: flat `Step`s, each of which
names all its inputs and its one output region, so that no step needs anything from another.

High-volume types are NamedTuples: DeepSeek-V3.2 has 92,425 tensors, and a NamedTuple is built in a third of the time
of a frozen dataclass. Nothing here knows torch. Next: table.py declares parameters, lower.py turns them into steps.
"""

from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import NamedTuple

from saccade.checkpoint.coding import Coding
from saccade.checkpoint.encoding import Encoding
from saccade.checkpoint.index import Index
from saccade.config.model import ModelConfig
from saccade.errors import Problem

Shape = tuple[int, ...]
Span = tuple[int, int]  # half-open: first, last + 1
Box = tuple[Span, ...]  # one span per axis

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}


def spell(box: Box) -> str:
    """A box as people write slices: [0:128, 0:7168]."""
    return "[" + ", ".join(f"{lo}:{hi}" for lo, hi in box) + "]"


class Kind(Enum):
    """What sort of thing a parameter is; with the run's dtype this decides what it is held in (lower.py)."""

    LINEAR = "linear"  # projections, MLPs, heads: FP8 128x128 kept if every part is stored so, else BF16
    EXPERTS = "experts"  # routed experts, stacked: codes of any encoding kept if every part has the same, else BF16
    BF16 = "bf16"  # always BF16: embeddings, wk_weights_proj, w_uk, w_uv
    F32 = "f32"  # always F32: norms and biases
    ROUTER = "router"  # the expert router: F32 if stored so, else BF16


class Part(NamedTuple):
    """`source[take]` goes to `parameter[put]`. Both boxes hold the same numbers in the same order."""

    source: str  # full name of the checkpoint tensor, with its .weight
    shape: Shape  # what the config says its shape is; the file must agree
    take: Box  # in coordinates of `view` if given, else of the tensor itself
    put: Box  # in coordinates of the parameter
    view: Shape | None = None  # the tensor seen in this shape, e.g. kv_b_proj as [heads, nope + v, rank]


class Param(NamedTuple):
    """One parameter of the model, on one rank."""

    name: str
    kind: Kind
    shape: Shape
    parts: tuple[Part, ...]


class Layout(NamedTuple):
    """Which share of the model a rank holds.

    `tp` ranks share heads, MLP columns and vocabulary. `ep` of them divide the experts; the tp // ep ranks that hold
    the same experts share each expert's columns.
    """

    tp: int = 1
    ep: int = 1
    rank: int = 0


class Stored(NamedTuple):
    """One tensor on the device. A parameter kept as codes is two or three: its codes, `<name>.scale`, and for some
    encodings `<name>.global_scale`."""

    name: str
    dtype: str  # safetensors spelling: BF16, F32, F8_E4M3, U8
    shape: Shape
    encoding: Encoding | None = None  # of codes
    group: tuple[int, int] | None = None  # of codes: rows and columns of the parameter that share a scale

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


class Step(NamedTuple):
    """Fill `target[put]` from `source[take]`, reading nothing else but the partners of `coding`."""

    target: str  # a Stored
    put: Box
    op: str  # "copy", "widen" (exact), "round" (to BF16), "dequantize" (codes times scales)
    source: str
    take: Box  # in elements of the source; for "dequantize" in numbers of the matrix, of which an element may hold 8
    view: Shape | None  # the shape in which `take` counts, if that is not the source's (or the matrix's) own
    coding: Coding | None = None  # dequantize only


class Ignored(NamedTuple):
    """A checkpoint tensor that no step reads, and why that is right."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything one rank does to load one checkpoint. Built by `make_plan`; proven by `check`."""

    config: ModelConfig
    index: Index
    layout: Layout
    dtype: str  # "auto" or "float32"
    mtp: bool  # whether the MTP layer is loaded
    params: tuple[Param, ...]
    stored: dict[str, Stored]
    steps: tuple[Step, ...]
    ignored: tuple[Ignored, ...]
    zeros: tuple[str, ...] = ()  # tensors that must hold zeros: offsets of codes that are read as symmetric
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP layer is there: asked for and shipped."""
        return f"model.layers.{self.config.num_hidden_layers}.eh_proj" in self.stored

    @property
    def device_bytes(self) -> int:
        """Bytes of parameters on this rank's device."""
        return sum(s.nbytes for s in self.stored.values())
