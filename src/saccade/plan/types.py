"""The words of a load plan, as plain data.

A family says in `Param`s what its model wants (models/parameters.py). A `Plan` is what the loader does: flat
`LoadStep`s, each of which names all its inputs and its one output region, so that no step needs anything from another.

High-volume types are NamedTuples, as there. Nothing here knows torch. Next: lower.py turns parameters into steps.
"""

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from saccade.checkpoint.coding import Coding
from saccade.checkpoint.encoding import Encoding
from saccade.checkpoint.index import Index
from saccade.config.file import Config
from saccade.errors import Problem
from saccade.models.parameters import Box, Layout, Param, Shape

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}


def show_box(box: Box) -> str:
    """A box as people write slices: [0:128, 0:7168]."""
    return "[" + ", ".join(f"{lo}:{hi}" for lo, hi in box) + "]"


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
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class LoadStep(NamedTuple):
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

    config: Config
    index: Index
    layout: Layout
    dtype: str  # "auto" or "float32"
    mtp: bool  # whether the MTP layer is loaded
    params: tuple[Param, ...]
    stored: dict[str, Stored]
    steps: tuple[LoadStep, ...]
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
