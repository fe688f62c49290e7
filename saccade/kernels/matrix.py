"""A weight matrix as it is stored: plain numbers, or codes with a scale per group.

This is all the model knows of quantisation: it passes a Matrix to an op, and the op looks at what it got.
"""

from typing import NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """[..., rows, columns] weights; y = x @ weight.T. Leading axes, if any, count experts."""

    data: Tensor  # bf16 or f32 numbers, or float8_e4m3fn codes
    scale: Tensor | None = None  # f32 [..., ceil(rows / group[0]), ceil(columns / group[1])]; None for plain numbers
    group: tuple[int, int] = (128, 128)  # rows and columns that share one scale
