"""The residual between the kernels of a step of one or two tokens, and the RMS norm of the next product.

The kernel that adds to the residual also writes what the next norm needs. Reference: `rms_norm` in reference.py. Next:
linear/gemv.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.types import GEMV_TOKENS, Norm


class PreparedResidual(NamedTuple):
    """The residual of up to GEMV_TOKENS tokens, with what its next norm needs.

    The kernel that writes x has both at hand. A reader that computed them in each of its programs took 1.2 us longer,
    of 7.
    """

    x: Tensor  # f32 [T, k]
    scaled: Tensor  # f32 [T, k]: x times the norm's weight
    squares: Tensor  # f32 [T, n]: parts of the sum of squares of x


Input = Tensor | PreparedResidual  # for few tokens prepared for its next norm


def get_values(x: Input) -> Tensor:
    return x.x if isinstance(x, PreparedResidual) else x


def prepare_residual(values: Tensor, following: Norm) -> Input:
    """f32 [T, hidden] as the reader with the norm `following` takes them."""
    if len(values) > GEMV_TOKENS:
        return values
    return PreparedResidual(values, values * following.weight, values.square().sum(1, keepdim=True))


# Where an RMS norm comes from.
NOT, INSIDE, AHEAD = (tl.constexpr(i) for i in range(3))


@triton.jit
def load_squares(squares, COUNT: tl.constexpr, COUNT_UP: tl.constexpr):
    """Parts of the sum of squares; asked for with the input, and added when the product is done."""
    part = tl.arange(0, COUNT_UP)
    return tl.load(squares + part, mask=part < COUNT, other=0.0)


@triton.jit
def find_factor(squares, K, eps):
    """1 / rms from parts of the sum of squares; NaN where a number above 1.8e19 made that infinite (reference.py)."""
    square = tl.sum(squares, 0) / K
    return tl.rsqrt(square + eps) + square * 0.0


@triton.jit
def store_residual(y, at, row, rows, gains, scaled, part):
    """A PreparedResidual's share of a program: y are rows `row` of x, `gains` the next norm's weights there."""
    tl.store(at + row, y, mask=row < rows)
    tl.store(scaled + row, y * gains, mask=row < rows)
    tl.store(part, tl.sum(tl.where(row < rows, y * y, 0.0), 0))


def take_input(x: Input, norm: Norm | None) -> tuple[Tensor, Tensor, int, int]:
    """(input, gain or squares, how many squares, where the norm comes from) for a kernel."""
    if norm is None:
        assert isinstance(x, Tensor), "a residual is prepared for a norm"
        return x, x, 1, NOT.value
    if isinstance(x, PreparedResidual):
        return x.scaled, x.squares, x.squares.shape[1], AHEAD.value
    return x, norm.weight, 1, INSIDE.value
