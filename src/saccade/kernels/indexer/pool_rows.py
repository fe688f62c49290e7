"""The index key of a pool of tokens, written when the pool's last token has come; and the keys of the latest tokens.

A program a token: the LayerNorm of its key, which goes into the ring of its request with its gate. The last token of a
pool has the others at hand: those of this step by their own norms once more, those of earlier steps from the ring. Of
a request one program at most reads the ring, for the pool that was begun before this step. What other tokens of a long
step would write over meanwhile, that program writes itself, behind its reads.

Reference: `pool_keys` and `keep_recent` in pools.py. Serves pools of 2, 4, ... tokens without RoPE, any number of
tokens; keys in BF16, F32 and FP8. Next: attention/cache_rows.py, whose launch this is part of.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Requests(NamedTuple):
    """Whose a step's tokens are, and what lies before them; as in ops/step.py."""

    request: Tensor  # i64 [T]
    positions: Tensor  # i64 [T]
    starts: Tensor  # i64 [R + 1], the first token of each
    ends: Tensor  # i64 [R], tokens of each in the cache after this step
    places: Tensor  # i64 [R], of each in the states


@triton.jit
def find_row_scale(largest, nothing):
    """As reference.quantize_rows: 2^ceil(log2(largest / 448)). `nothing` is 0, or NaN where a number is not finite:
    `max` drops a NaN, and an infinite number would be the code of 448."""
    bits = tl.maximum(largest, 1e-4).to(tl.int32, bitcast=True)
    return (((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)).to(tl.float32, bitcast=True) + nothing


@triton.jit
def _normalize_keys(key, stride, row, asked, weight, bias, eps, DIM: tl.constexpr, DIM_UP: tl.constexpr):
    """f32 [rows, DIM_UP]: keys behind their LayerNorm, where they are asked for."""
    column = tl.arange(0, DIM_UP)
    inside = column < DIM
    a = tl.load(key + row[:, None] * stride + column[None, :], mask=asked[:, None] & inside[None, :], other=0.0)
    mean = tl.sum(a, 1) / DIM
    off = tl.where(inside[None, :], a - mean[:, None], 0.0)
    square = tl.sum(off * off, 1) / DIM
    factor = tl.rsqrt(square + eps) + square * 0.0  # as residual.find_factor
    gains = tl.load(weight + column, mask=inside, other=0.0)
    return off * factor[:, None] * gains[None, :] + tl.load(bias + column, mask=inside, other=0.0)[None, :]


@triton.jit
def write_pooled_key(
    key, gate, stride, weight, bias, eps, place_bias, ring, request, positions, starts, ends, places, slots, keys,
    scales, token, DIM: tl.constexpr, DIM_UP: tl.constexpr, POOL: tl.constexpr, RING: tl.constexpr,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    slot, owner, position = tl.load(slots + token), tl.load(request + token), tl.load(positions + token)
    start, last = tl.load(positions + tl.load(starts + owner)), tl.load(ends + owner) - 1  # of this step
    ring += tl.load(places + owner) * (RING * 2 * DIM)
    member, column = tl.arange(0, POOL), tl.arange(0, DIM_UP)
    inside, back = (column < DIM)[None, :], POOL - 1 - member
    at, row = position - back, token - back
    is_last = (slot >= 0) & (position % POOL == POOL - 1)
    asked = back <= tl.where(is_last, POOL, 0)  # all of a pool that ends here, else its own
    here, earlier = asked & (at >= start), asked & (at < start)
    k = _normalize_keys(key, stride, row, here, weight, bias, eps, DIM, DIM_UP)
    g = tl.load(gate + row[:, None] * stride + column[None, :], mask=here[:, None] & inside, other=0.0)
    if is_last:
        held = ring + (at % RING)[:, None] * (2 * DIM) + column[None, :]
        of_ring = earlier[:, None] & inside
        k = tl.where(here[:, None], k, tl.load(held, mask=of_ring, other=0.0))
        g = tl.where(here[:, None], g, tl.load(held + DIM, mask=of_ring, other=0.0))
        bias_at = place_bias + member[:, None] * DIM + column[None, :]
        raw = g + tl.load(bias_at, mask=inside & (member >= 0)[:, None], other=0.0)
        share = tl.exp(raw - tl.max(raw, 0)[None, :])
        y = tl.sum(share * k, 0) / tl.sum(share, 0)
        pool = slot // POOL
        if QUANTISED:
            is_in = column < DIM
            scale = find_row_scale(tl.max(tl.where(is_in, tl.abs(y), 0.0), 0), tl.sum(tl.where(is_in, y * 0.0, 0.0), 0))
            tl.store(scales + pool, scale)
            y = y / scale
        tl.store(keys + pool * DIM + column, y.to(keys.dtype.element_ty), mask=column < DIM)
    tl.debug_barrier()  # all threads have read the ring
    begun = start // POOL * POOL  # where the pool begins that was begun before this step, if there is one
    is_read = (start % POOL > 0) & (begun + POOL - 1 <= last)
    older = position - (position - start) // RING * RING - RING  # before this step, in the same place of the ring
    if (slot >= 0) & (position > last - RING) & ((older < begun) | (is_read == 0)):
        own = (back == 0)[:, None]
        to = ring + position % RING * (2 * DIM) + column
        tl.store(to, tl.sum(tl.where(own, k, 0.0), 0), mask=column < DIM)
        tl.store(to + DIM, tl.sum(tl.where(own, g, 0.0), 0), mask=column < DIM)
    if is_last & is_read & (position == begun + POOL - 1):
        later = last - (last - at) % RING  # the last of this step, in the same place of the ring
        taken = (at < start) & (later >= start)
        k = _normalize_keys(key, stride, token + later - position, taken, weight, bias, eps, DIM, DIM_UP)
        g_at = gate + (token + later - position)[:, None] * stride + column[None, :]
        to_row = ring + (later % RING)[:, None] * (2 * DIM) + column[None, :]
        tl.store(to_row, k, mask=taken[:, None] & inside)
        g = tl.load(g_at, mask=taken[:, None] & inside, other=0.0)
        tl.store(to_row + DIM, g, mask=taken[:, None] & inside)
