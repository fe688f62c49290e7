"""The words in which a family says what its parameters are made of, and the few shapes that its rules take.

A `Part` says: take this box of that checkpoint tensor, put it at that box of this parameter. A `Param` is what the
model wants: a name, a kind, a shape and its parts. How a tensor is stored is plan/lower.py's business. Part and Param
are NamedTuples: DeepSeek-V3.2 has 92,425 tensors, and a NamedTuple is built in a third of the time of a frozen
dataclass. Knows no config, no file and no torch. Next: dsa/parameters.py.
"""

from enum import Enum
from typing import NamedTuple

Shape = tuple[int, ...]
Span = tuple[int, int]  # half-open: first, last + 1
Box = tuple[Span, ...]  # one span per axis


class Kind(Enum):
    """What sort of thing a parameter is; with the run's dtype this decides what it is held in (lower.py)."""

    LINEAR = "linear"  # projections, MLPs, heads: FP8 128x128 kept if every part is stored so, else BF16
    EXPERTS = "experts"  # routed experts, stacked: codes of any encoding kept if every part has the same, else BF16
    BF16 = "bf16"  # always BF16: embeddings, wk_weights_proj, w_uk, w_uv
    F32 = "f32"  # always F32: norms and biases
    F32_ONLY = "f32 only"  # F32 in the file too: what an exponential magnifies, or sums that must be 1
    ROUTER = "router"  # the expert router, mixers of streams: F32 if stored so, else BF16


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


class Extras(NamedTuple):
    """What a checkpoint may or may not ship. Read off the names in the headers, see `find_extras` in lower.py."""

    mtp: bool = False  # the multi-token prediction layer
    mtp_embed: bool = False  # its own copy of the embedding (DeepSeek ships one, GLM-5 does not)
    mtp_head: bool = False  # its own copy of the output head


# The few shapes that a rule can take.


def whole(name: str, kind: Kind, shape: Shape) -> Param:
    """A matrix that every rank holds whole."""
    return rows(name, kind, shape, (0, shape[0]))


def rows(name: str, kind: Kind, shape: Shape, mine: Span) -> Param:
    """The rows `mine` of a matrix."""
    return stack(name, kind, ((name, shape[0]),), cols=shape[1], mine=mine)


def columns(name: str, kind: Kind, shape: Shape, mine: Span) -> Param:
    """The columns `mine` of a matrix."""
    every, width = (0, shape[0]), mine[1] - mine[0]
    return Param(name, kind, (shape[0], width), (Part(name + ".weight", shape, (every, mine), (every, (0, width))),))


def stack(name: str, kind: Kind, pieces: tuple[tuple[str, int], ...], cols: int, mine: Span | None = None) -> Param:
    """Matrices of `cols` columns over one another: all their rows, or of each the rows `mine`."""
    parts, top = [], 0
    for source, height in pieces:
        lo, hi = mine or (0, height)
        parts.append(Part(source + ".weight", (height, cols), ((lo, hi), (0, cols)), ((top, top + hi - lo), (0, cols))))
        top += hi - lo
    return Param(name, kind, (top, cols), tuple(parts))


def of_heads(name: str, source: str, view: Shape, heads: Span, inner: Span) -> Param:
    """Of a matrix seen as [heads, rows of one head, columns]: the rows `inner` of this rank's heads."""
    n, height, cols = heads[1] - heads[0], inner[1] - inner[0], (0, view[2])
    part = Part(
        source + ".weight", (view[0] * view[1], view[2]), (heads, inner, cols), ((0, n), (0, height), cols), view
    )
    return Param(name, Kind.BF16, (n, height, view[2]), (part,))


def vector(name: str, length: int, kind: Kind = Kind.F32) -> Param:
    """A norm or a bias, whole on every rank."""
    every = ((0, length),)
    return Param(name, kind, (length,), (Part(name, (length,), every, every),))


def share(n: int, ranks: int, rank: int) -> Span:
    """Rank's contiguous share of n things; shares differ by at most one."""
    return n * rank // ranks, n * (rank + 1) // ranks


def share_experts(n: int, at: Layout) -> Span:
    """The ones of n routed experts that a rank holds, whole or some of their columns."""
    return share(n, at.ep, at.rank // (at.tp // at.ep))


def scaled(span: Span, by: int) -> Span:
    """A span of things as a span of rows, `by` rows to a thing."""
    return span[0] * by, span[1] * by
