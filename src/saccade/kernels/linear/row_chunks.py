"""Chunks of weight rows, as products of few tokens take them: loaded as stored, decoded, multiplied in fp32.

Serves codes in FP8 by 128 x 128, BF16 and F32. Next: gemv.py, moe/down.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import ONCE
from saccade.kernels.types import SCALE_BLOCK, Matrix

QUAD = tl.constexpr(4)  # columns of a thread: 4 codes are one load of 4 bytes, their inputs one of 16
WIDEST = 1024  # columns of a chunk, of which a warp takes 128
MOST_CHUNKS = 8  # that are held at once; longer rows go on chunk by chunk


class StoredMatrix(NamedTuple):
    """A matrix as the kernels take it."""

    data: Tensor  # u8 codes, or bf16 or f32 numbers [rows, k]
    scale: Tensor  # f32; unused without codes
    is_coded: bool


def as_stored(w: Matrix) -> StoredMatrix:
    """Raises ValueError for codes that these kernels do not read: the plan keeps e4m3 by 128x128 only."""
    if w.scale is None:
        return StoredMatrix(w.data, w.data, False)
    if w.code != "e4m3" or w.group != (SCALE_BLOCK, SCALE_BLOCK) or w.global_scale is not None:
        raise ValueError(
            f"a {w.code} matrix with groups of {w.group}: expected e4m3 by {(SCALE_BLOCK, SCALE_BLOCK)}, or numbers"
        )
    return StoredMatrix(w.data.view(torch.uint8), w.scale, True)


class Chunking(NamedTuple):
    """How rows of k columns are divided into chunks."""

    width: int
    chunks: int
    held: int
    is_even: bool  # whether the chunks end where the rows do

    @property
    def warps(self) -> int:
        return max(1, self.width // SCALE_BLOCK)


def find_chunking(k: int, widest: int | None = None) -> Chunking:
    """The widest chunks that divide k; if none does, chunks that overhang."""
    width = min(widest or WIDEST, max(SCALE_BLOCK, triton.next_power_of_2(k)))
    while width > 512 and k % width:
        width //= 2
    chunks = -(-k // width)
    return Chunking(width, chunks, min(chunks, MOST_CHUNKS), k % width == 0)


def count_program_rows(stored: StoredMatrix, how: Chunking, tile_bytes: int) -> int:
    """Rows a program takes: as many as fill its tile, between 1 and 32."""
    row_bytes = how.width * how.held * stored.data.element_size()
    return max(1, min(32, 1 << (tile_bytes // row_bytes).bit_length() - 1)) if tile_bytes >= row_bytes else 1


@triton.jit
def load_chunk(w, row, rows, start, K, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """[CHUNK / 4, BN, 4] weights of rows `row` from column `start` on, as they are stored: asked for, not yet used.

    In this order of axes Triton gives a thread the same columns of every row, and of the input: nothing is exchanged.
    """
    column = start + tl.arange(0, CHUNK // QUAD)[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
    places = w + row.to(tl.int64)[None, :, None] * K + column[:, None, :]
    inside = (row < rows)[None, :, None]
    if not EVEN:
        inside = inside & (column < K)[:, None, :]
    return tl.load(places, mask=inside, other=0, eviction_policy=ONCE)


@triton.jit
def load_sum(x, apart, start, K, CHUNK: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr):
    """`load_input` of the sum of PARTS rows, `apart` from each other."""
    a = load_input(x, start, K, CHUNK, EVEN)
    for i in tl.static_range(1, PARTS):
        a += load_input(x + i * apart, start, K, CHUNK, EVEN)
    return a


@triton.jit
def load_input(x, start, K, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """f32 [CHUNK / 4, 4] from column `start` on."""
    column = start + tl.arange(0, CHUNK // QUAD)[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
    if EVEN:
        return tl.load(x + column).to(tl.float32)
    else:
        return tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def load_scales(scale, start, K, CHUNK: tl.constexpr, CODED: tl.constexpr, EACH: tl.constexpr = QUAD):
    """f32 [CHUNK / EACH] scales, one for each thread's columns; `scale` points to the rows' block row."""
    column = start + tl.arange(0, CHUNK // EACH) * EACH
    if CODED:
        return tl.load(scale + column // 128, mask=column < K, other=0.0)
    else:
        return tl.full(column.shape, 1.0, tl.float32)


@triton.jit
def to_numbers(w, CODED: tl.constexpr):
    """f32 numbers of weights as they are stored, their scales apart."""
    if CODED:
        return w.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return w.to(tl.float32)


@triton.jit
def multiply_chunk(held, a, scales, CODED: tl.constexpr):
    """f32 [CHUNK / 4, BN]: each thread's part of the sums."""
    sums = tl.sum(to_numbers(held, CODED) * a[:, None, :], 2)
    return sums * scales[:, None] if CODED else sums
