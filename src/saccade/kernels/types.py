"""A weight matrix as it is stored: plain numbers, or codes with a scale per group.

This is all the model knows of quantisation: it passes a Matrix to an op, and the op looks at what it got.
"""

from typing import NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """[..., rows, columns] weights; y = x @ weight.T. Leading axes, if any, count experts."""

    data: Tensor  # bf16 or f32 numbers, or codes; several 4-bit codes of a row share an element
    scale: Tensor | None = None  # [..., ceil(rows / group[0]), ceil(columns / group[1])]; None for plain numbers
    group: tuple[int, int] = (128, 128)  # rows and columns that share one scale
    code: str = "e4m3"  # how a number is spelled: see codes.py
    global_scale: Tensor | None = None  # f32 [..., n, 1]: one for each of n equal runs of rows (gate and up have two)
    divides: bool = False  # by the global scale, which otherwise multiplies
