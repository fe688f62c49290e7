"""Whether a parameter can stay in the codes of its file, and the steps that leave it so.

Codes and scales are then independent copies: two, or three with a global scale. Parts may be cut and stacked only where
no group of numbers that share a scale is cut, and no element that holds several codes. Pure arithmetic on boxes.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from saccade.checkpoint.coding import Coding
from saccade.checkpoint.encoding import WHOLE, Encoding, Shape
from saccade.checkpoint.index import Entry
from saccade.models.parameters import Box, Param, Part
from saccade.plan.types import LoadStep, Stored

Cell = tuple[int, ...]  # rows and columns
ALL: Cell = (WHOLE, WHOLE)
ONE: Box = ((0, 1), (0, 1))


class Cells(NamedTuple):
    """Rows and columns of a kept parameter that share an element of its scale, and of its global scale."""

    scale: Cell
    global_scale: Cell | None


def find_cells(param: Param, encoding: Encoding) -> Cells | Part:
    """How the parameter's scales lie if it is kept as codes, or the first part that prevents it."""
    sides = tuple(hi - lo for lo, hi in param.parts[0].put[-2:])
    scale = tuple(side if c == WHOLE else c for side, c in zip(sides, encoding.cell, strict=True))
    has_global = encoding.global_suffix is not None
    for part in param.parts:
        put = part.put[-2:]
        if not _keeps_cells(part.take, put, part.shape, encoding.cell, scale, encoding.packed) or (
            has_global and not _keeps_cells(part.take, put, part.shape, ALL, sides, encoding.packed)
        ):
            return part
    return Cells(scale, sides if has_global else None)


def keep(
    param: Param, codings: Sequence[Coding], cells: Cells, entries: Mapping[str, Entry]
) -> tuple[list[Stored], list[LoadStep]]:
    """The tensors on the device and the steps that fill them. All codings are of one encoding."""
    name, encoding = param.name, codings[0].encoding
    lead, matrix = param.shape[:-2], param.shape[-2:]
    held = encoding.scale_held or entries[codings[0].scale].dtype
    height, width = cells.scale
    stored = [
        Stored(
            name,
            encoding.codes,
            lead + encoding.codes_shape(matrix),
            encoding,
            (height, width // encoding.scales_packed),
        ),
        Stored(name + ".scale", held, lead + _count(matrix, cells.scale)),
    ]
    if cells.global_scale is not None:
        stored.append(Stored(name + ".global_scale", "F32", lead + _count(matrix, cells.global_scale)))
    steps: list[LoadStep] = []
    for (_, _, take, put, _), coding in zip(param.parts, codings, strict=True):
        codes = packed_box(take, encoding.packed)
        steps.append(LoadStep(name, packed_box(put, encoding.packed), "copy", coding.codes, codes, None))
        source, grid = entries[coding.scale], encoding.scale_shape(coding.shape)
        view = grid if source.shape != grid else None
        op = "copy" if source.dtype == held else "widen"
        scales = cell_box(take, encoding.cell)
        steps.append(LoadStep(name + ".scale", cell_box(put, cells.scale), op, source.name, scales, view))
        if coding.global_scale is not None and cells.global_scale is not None:
            to = cell_box(put, cells.global_scale)
            steps.append(LoadStep(name + ".global_scale", to, "copy", coding.global_scale, ONE, (1, 1)))
    return stored, steps


def _count(shape: Shape, cell: Cell) -> Shape:
    return tuple(-(-n // c) for n, c in zip(shape, cell, strict=True))


@lru_cache(maxsize=4096)
def cell_box(box: Box, cell: Cell) -> Box:
    """The cells that a box of numbers touches; leading axes (experts) stay as they are."""
    tail = tuple((lo // c, -(-hi // c)) for (lo, hi), c in zip(box[-2:], cell, strict=True))
    return box[:-2] + tail


@lru_cache(maxsize=4096)
def packed_box(box: Box, packed: int) -> Box:
    """The elements of the codes that hold a box of numbers: the last axis is packed."""
    lo, hi = box[-1]
    return (*box[:-1], (lo // packed, -(-hi // packed)))


@lru_cache(maxsize=4096)
def _keeps_cells(take: Box, put: Box, shape: Shape, cell: Cell, held: Cell, packed: int) -> bool:
    """Whether cells stay whole cells: cut on their borders, or at the source's own ragged end. Of a cell that spans an
    axis any slice may be taken, because it still shares one scale; such slices are stacked if they are equally high."""
    if any(n % packed for n in (shape[-1], *take[-1], *put[-1])):
        return False
    for (lo, hi), (top, end), n, c, side in zip(take, put, shape, cell, held, strict=True):
        if c == WHOLE:
            if end - top != side or top % side:
                return False
        elif lo % c or top % c or (hi % c and hi != n):
            return False
    return True
