"""Rows of codes, as a checkpoint holds them, become f32 numbers; and what holding numbers in fewer bits costs.

Loading, converting and looking into files all decode here, so they cannot differ. The product itself is
kernels/reference.py:dequantize. Knows no files and no plan. Next: load_step.py, convert/stream.py, inspect/stored.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.checkpoint.coding import Coding
from saccade.kernels.reference import decode
from saccade.kernels.types import Matrix


def matrix_of(coding: Coding, codes: Tensor, partners: Sequence[Tensor]) -> Matrix:
    """Codes [rows, elements] and the whole tensors of `coding.partners`, in whichever shape the file writes them."""
    e = coding.encoding
    scale = partners[0].view(e.scale_shape(coding.shape))
    second = partners[1].view(1, 1) if len(partners) > 1 else None
    return Matrix(codes, scale, e.group, e.code, second, e.divides)


def decode_rows(
    coding: Coding,
    codes: Tensor,
    partners: Sequence[Tensor],
    first_row: int = 0,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """f32 [rows, columns] of the whole rows of codes that begin at `first_row`, where the partners are: all columns, or
    a half-open span of them. Codes that share an element with others are decoded and dropped again."""
    left, right = columns or (0, coding.shape[1])
    packed = coding.encoding.packed
    first = left // packed  # in elements
    taken = codes[:, first : -(-right // packed)].to(partners[0].device)
    numbers = decode(matrix_of(coding, taken, partners), (first_row, first * packed))
    return numbers[:, left - first * packed : right - first * packed]


def measure_rounding(exact: Tensor, held: Tensor) -> float:
    """The largest |held - exact| / |exact| of f32 numbers and what became of them: infinite if one overflowed. Numbers
    that are NaN or infinite themselves are not rounded; that they are there is for others to say."""
    back = held.float()
    if torch.equal(back, exact):  # the usual case costs two passes, not six
        return 0.0
    least = torch.finfo(torch.float32).tiny
    relative = (back - exact).abs_() / exact.abs().clamp_(min=least)  # NaN / inf and inf - inf are NaN
    return float(relative.nan_to_num_(nan=0.0, posinf=torch.inf).max())
