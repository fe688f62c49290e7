"""Index queries of prompts as their scores take them: rotated, and rounded to BF16 or to FP8 codes.

One pass, a program a token: 268 MB read for 8,192 tokens of 64 heads, 134 or 67 written. In torch's operations the
same moves some ten times as much. Head weights take the scales of codes: relu lets a positive factor through.

Reference: `rotate` and `quantize_rows` in reference.py, bit for bit. Serves any number of tokens. Next:
prompt_logits.py, logits.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import find_fp8_scale
from saccade.kernels.types import Rotation


class IndexQueries(NamedTuple):
    numbers: Tensor  # bf16 or e4m3 [T, heads, dim], rotated
    weights: Tensor  # f32 [T, heads]: of heads, times the scale of the logits and those of codes


def write_index_queries(
    q: Tensor, weights: Tensor, rotation: Rotation, is_interleaved: bool, scale: float, dtype: torch.dtype
) -> IndexQueries:
    """q: f32 [T, heads, dim], whose first dimensions are turned; weights: f32 [T, heads], a view will do;
    dtype: BF16 or e4m3."""
    (t, heads, dim), rope = q.shape, 2 * rotation.cos.shape[1]
    assert q.stride(2) == 1 and q.stride(1) == dim and weights.stride(1) == 1
    numbers = torch.empty(t, heads, dim, dtype=dtype, device=q.device)
    out = torch.empty(t, heads, dtype=torch.float32, device=q.device)
    _write_queries[t,](
        q, weights, rotation.cos, rotation.sin, numbers, out, scale, q.stride(0), weights.stride(0), HEADS=heads,
        ROWS=triton.next_power_of_2(heads), DIM=dim, HALF=rope // 2, REST=triton.next_power_of_2(max(dim - rope, 1)),
        INTERLEAVED=is_interleaved, CODED=dtype == torch.float8_e4m3fn, num_warps=4,
    )  # fmt: skip
    return IndexQueries(numbers, out)


@triton.jit
def _write_queries(
    q, weights, cos, sin, numbers, out, scale, q_stride, w_stride, HEADS: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
    there = (head < HEADS)[:, None]
    line = q + token * q_stride + head[:, None] * DIM
    to = numbers + (token * HEADS + head[:, None]) * DIM
    pair = tl.arange(0, HALF)
    place = 2 * pair if INTERLEAVED else pair
    other = place + 1 if INTERLEAVED else pair + HALF
    column = 2 * HALF + tl.arange(0, REST)
    inside = there & (column < DIM)[None, :]
    c, s = tl.load(cos + token * HALF + pair)[None, :], tl.load(sin + token * HALF + pair)[None, :]
    a = tl.load(line + place[None, :], mask=there, other=0.0)
    b = tl.load(line + other[None, :], mask=there, other=0.0)
    rest = tl.load(line + column[None, :], mask=inside, other=0.0)
    first, second = a * c - b * s, b * c + a * s
    factor = tl.load(weights + token * w_stride + head, mask=head < HEADS, other=0.0)
    if CODED:
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.maximum(tl.max(tl.abs(second), 1), tl.max(tl.abs(rest), 1)))
        # NaN where a number is not finite: `max` drops a NaN, and an infinite number would be the code of 448.
        nothing = tl.sum(first * 0.0, 1) + tl.sum(second * 0.0, 1) + tl.sum(rest * 0.0, 1)
        scales = find_fp8_scale(largest) + nothing
        factor *= scales
        first, second, rest = first / scales[:, None], second / scales[:, None], rest / scales[:, None]
    tl.store(out + token * HEADS + head, factor * scale, mask=head < HEADS)
    dtype = numbers.dtype.element_ty
    tl.store(to + place[None, :], first.to(dtype), mask=there)
    tl.store(to + other[None, :], second.to(dtype), mask=there)
    tl.store(to + column[None, :], rest.to(dtype), mask=inside)
