"""Products with one input in as few launches as its number of tokens allows: GEMV for one, tensor cores for up to 16.

Next: rows.py for one token, skinny.py for more.
"""

from collections.abc import Sequence

from torch import Tensor

from saccade.kernels.rows import Norm, Part, Stream, multiply
from saccade.kernels.skinny import skinny


def project(
    x: Tensor | Stream, parts: Sequence[Part], norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """f32 [T, rows of all parts] = norm(x) [T, k] @ part.T, side by side, plus `residual` of that shape; T up to 16.

    x: f32, rows may be strided. One to three parts.
    """
    if isinstance(x, Stream) or x.shape[0] == 1:
        return multiply(x, parts, norm, residual)
    return skinny(x, parts, norm, residual)
