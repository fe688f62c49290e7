"""Rows of the latent cache as kernels read them: numbers, whatever the pool holds.

A pool of codes is read as codes, 644 bytes of a row where BF16 has 1,152, and decoded in registers. A code times a
power of two is a BF16 number, so products see exactly what `read_latents` of reference.py gives, and no kernel differs
behind its loads. Scales that met scores and probabilities instead would save a product a code; but then the compiler
decodes twice, for keys and for values, and reads the latter byte by byte (Triton 3.9: 128 conversions of a thread in
place of 64). Next: sparse_decode.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.types import Latents


def pass_latents(pool: Latents) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's three pointers: numbers or codes, and beside codes the rope and the scales; else the first again."""
    if pool.rope is None or pool.scales is None:
        return pool.data, pool.data, pool.data
    return pool.data, pool.rope, pool.scales


@triton.jit
def inside(rows, columns, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Mask of a tile's rows, and of its columns where they are padded."""
    mask = rows[:, None] if WIDTH == COLUMNS else rows[:, None] & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def find_row(latent, rope, slot, WIDTH: tl.constexpr, ROPE: tl.constexpr, CODED: tl.constexpr):
    """Where the two parts of a row begin. slot: int64, of any shape."""
    if CODED:
        row, turned = latent + slot * WIDTH, rope + slot * ROPE
    else:
        row = latent + slot * (WIDTH + ROPE)
        turned = row + WIDTH
    return row, turned


@triton.jit
def load_latents(
    latent, rope, scales, slots, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROPE: tl.constexpr,
    ROPE_COLUMNS: tl.constexpr, CODED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of the pool in their two parts: [rows, COLUMNS], [rows, ROPE_COLUMNS]; without RoPE the first twice. Zeros
    where a row is not `there`, if MASKED."""
    column, rope_column = tl.arange(0, COLUMNS), tl.arange(0, ROPE_COLUMNS)
    row, turned = find_row(latent, rope, slots.to(tl.int64)[:, None], WIDTH, ROPE, CODED)
    if MASKED:
        rows = tl.load(row + column[None, :], mask=inside(there, column, WIDTH, COLUMNS), other=0.0)
    else:
        rows = tl.load(row + column[None, :])
    if CODED:
        factor = tl.load(scales + slots, mask=there, other=0.0) if MASKED else tl.load(scales + slots)
        rows = (rows.to(tl.float32) * factor[:, None]).to(rope.dtype.element_ty)
    beside = rows
    if ROPE > 0:
        if MASKED:
            mask = inside(there, rope_column, ROPE, ROPE_COLUMNS)
            beside = tl.load(turned + rope_column[None, :], mask=mask, other=0.0)
        else:
            beside = tl.load(turned + rope_column[None, :])
    return rows, beside
