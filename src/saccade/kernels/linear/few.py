"""Products with one input in as few launches as the tokens allow: FMAs for one and two, tensor cores for up to 16.

Next: rows.py, skinny.py.
"""

from collections.abc import Sequence

from torch import Tensor

from saccade.kernels.linear.gemv import multiply
from saccade.kernels.linear.split_k import LONG_BYTES, skinny
from saccade.kernels.residual import FEW, Norm, Residual, plain
from saccade.kernels.linear.row_tiles import Part


def project(x: Residual, parts: Sequence[Part], norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
    """f32 [T, rows of all parts] = norm(x) [T, k] @ part.T, side by side, plus `residual` of that shape; T up to 16.

    x: f32, rows may be strided. One to three parts.
    """
    tokens = len(plain(x))
    if tokens == 1 or (tokens <= FEW and sum(find_bytes(w) for w in parts) < LONG_BYTES):
        return multiply(x, parts, norm, residual)
    return skinny(plain(x), parts, norm, residual)


def find_bytes(w: Part) -> int:
    return (w if isinstance(w, Tensor) else w.data).nbytes
