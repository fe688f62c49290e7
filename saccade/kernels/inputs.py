"""Products with one input in as few launches as the tokens allow: FMAs for one and two, tensor cores for up to 16.

Next: rows.py for one token, several.py for two, skinny.py for more.
"""

from collections.abc import Sequence

from torch import Tensor

from saccade.kernels.rows import multiply
from saccade.kernels.several import MOST_SEVERAL, multiply_several
from saccade.kernels.skinny import LONG_BYTES, skinny
from saccade.kernels.stream import Norm, Stream
from saccade.kernels.strips import Part


def project(
    x: Tensor | Stream, parts: Sequence[Part], norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """f32 [T, rows of all parts] = norm(x) [T, k] @ part.T, side by side, plus `residual` of that shape; T up to 16.

    x: f32, rows may be strided. One to three parts.
    """
    if isinstance(x, Stream) or x.shape[0] == 1:
        return multiply(x, parts, norm, residual)
    if x.shape[0] <= MOST_SEVERAL and sum(find_bytes(w) for w in parts) < LONG_BYTES:
        return multiply_several(x, parts, norm, residual)
    return skinny(x, parts, norm, residual)


def find_bytes(w: Part) -> int:
    return (w if isinstance(w, Tensor) else w.data).nbytes
