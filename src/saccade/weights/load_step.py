"""What one step of a plan does with rows of a checkpoint tensor: put those that it takes in their place.

Copies, casts and decodes; says how much a cast rounded. Does not know what has come and what is missing:
loader.py does. Next: dequantize.py, how codes become numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.models.parameters import Box
from saccade.plan.types import LoadStep
from saccade.weights.dequantize import decode_rows, measure_rounding


class Rows(NamedTuple):
    """A run of rows of a checkpoint tensor."""

    tensor: Tensor
    first: int

    @property
    def last(self) -> int:
        return self.first + (len(self.tensor) if self.tensor.ndim else 1)


def run_load_step(step: LoadStep, target: Tensor, rows: Rows, scales: Sequence[Tensor]) -> float | None:
    """Do the part of a step that these rows hold. `scales`: the whole partners of codes that are decoded. Returns the
    largest rounding, relative to the exact number, or None if nothing was rounded on purpose."""
    region = target[tuple(slice(*span) for span in step.put)]
    view = step.view
    if view is None or len(view) < 3:
        if view is not None:  # a scale [rows] or [] as the matrix that it is
            rows = Rows(rows.tensor.reshape(-1, view[1]), rows.first)
        if region.ndim > len(step.take):  # an expert's place in its stack
            region = region[0]
        return _fill(region, step.take, step, rows, scales)
    height, (inner, columns) = view[1], step.take[1:]
    roundings = []
    for head, region_of_head in zip(range(*step.take[0]), region, strict=True):
        take = ((head * height + inner[0], head * height + inner[1]), columns)
        roundings.append(_fill(region_of_head, take, step, rows, scales))
    return max((r for r in roundings if r is not None), default=None)


def _fill(region: Tensor, take: Box, step: LoadStep, rows: Rows, scales: Sequence[Tensor]) -> float | None:
    """Those of the rows that lie in the box `take` go to their place in `region`."""
    lo, hi = max(take[0][0], rows.first), min(take[0][1], rows.last)
    if lo >= hi:
        return None
    region = region[lo - take[0][0] : hi - take[0][0]]
    numbers = rows.tensor[lo - rows.first : hi - rows.first]
    if step.coding is not None:
        exact = decode_rows(step.coding, numbers, scales, lo, take[1])
    else:
        numbers = numbers[:, slice(*take[1])] if len(take) == 2 else numbers
        if step.op in ("copy", "widen"):
            region.copy_(numbers)
            return None
        exact = numbers.to(region.device)
    region.copy_(exact)
    return None if region.dtype == torch.float32 else measure_rounding(exact.float(), region)
