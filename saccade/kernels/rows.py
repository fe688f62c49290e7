"""Matrix times vector, for one token: what a decode step is made of, bound by the bytes of the weights.

A program owns a few whole rows. All of their weights are asked for at once, before the kernel waits for its input, so
that memory is busy while the last kernel ends; then they meet the input in fp32 FMAs, which round nothing. Several
matrices with the same input share a launch, and the RMS norm in front costs no pass: its factor is applied to the
finished sums. Reference: `linear` and `rms_norm` in reference.py. For 2 to 16 tokens see inputs.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import ONCE, begin, uses_pdl, wait
from saccade.kernels.matrix import Matrix

BLOCK = 128  # columns that share a scale
QUAD = tl.constexpr(4)  # columns of a thread: 4 codes are one load of 4 bytes, their inputs one of 16
# Columns of a strip, of which a warp takes 128. Many programs of 4 warps (1.3 us less for 17.9 MB) want bytes enough
# for all multiprocessors; below, few of 8 are faster (3.2 -> 2.4 us for 3.7 MB).
WIDEST = 1024
NARROW = 512
MANY_BYTES = 8 << 20
TILE_BYTES = 57344  # of weights that a program holds; with half of it q_a, kv_a and wk take 0.5 us more
# Of a matrix behind the first: small programs fill up the multiprocessors that have one fewer of the large ones. wk and
# weights_proj by single rows instead of four save 1 us a layer.
LATER_TILE_BYTES = 14336
SMALL_TILE_BYTES = 28672  # where there are few of them: 128 programs for the router instead of 64, 2.1 us, not 2.5
MOST_STRIPS = 8  # that are held at once; longer rows go on strip by strip

Part = Matrix | Tensor


class Norm(NamedTuple):
    """x / rms(x) * weight."""

    weight: Tensor  # f32 [k]
    eps: float


class Stream(NamedTuple):
    """The residual stream of one token, with what its next norm needs: who writes x has it at hand, and a reader that
    computed it again in each of its programs took 1.2 us longer, of 7."""

    x: Tensor  # f32 [1, k]
    scaled: Tensor  # f32 [1, k]: x times the norm's weight
    squares: Tensor  # f32 [1, n]: parts of the sum of squares of x


# Where an RMS norm comes from.
NOT, INSIDE, AHEAD = (tl.constexpr(i) for i in range(3))


@triton.jit
def load_strip(w, row, rows, start, K, STRIP: tl.constexpr, EVEN: tl.constexpr):
    """[STRIP / 4, BN, 4] weights of rows `row` from column `start` on, as they are stored: asked for, not yet used.

    In this order of axes Triton gives a thread the same columns of every row, and of the input: nothing is exchanged.
    """
    column = start + tl.arange(0, STRIP // QUAD)[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
    places = w + row.to(tl.int64)[None, :, None] * K + column[:, None, :]
    inside = (row < rows)[None, :, None]
    if not EVEN:
        inside = inside & (column < K)[:, None, :]
    return tl.load(places, mask=inside, other=0, eviction_policy=ONCE)


@triton.jit
def load_sum(x, start, K, STRIP: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr):
    """`load_input` of the sum of PARTS rows of x."""
    a = load_input(x, start, K, STRIP, EVEN)
    for i in tl.static_range(1, PARTS):
        a += load_input(x + i * K, start, K, STRIP, EVEN)
    return a


@triton.jit
def load_input(x, start, K, STRIP: tl.constexpr, EVEN: tl.constexpr):
    """f32 [STRIP / 4, 4] from column `start` on."""
    column = start + tl.arange(0, STRIP // QUAD)[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
    if EVEN:
        return tl.load(x + column).to(tl.float32)
    else:
        return tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def load_scales(scale, start, K, STRIP: tl.constexpr, CODED: tl.constexpr, EACH: tl.constexpr = QUAD):
    """f32 [STRIP / EACH] scales, one for each thread's columns; `scale` points to the rows' block row."""
    column = start + tl.arange(0, STRIP // EACH) * EACH
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
def multiply_strip(held, a, scales, CODED: tl.constexpr):
    """f32 [STRIP / 4, BN]: each thread's part of the sums."""
    sums = tl.sum(to_numbers(held, CODED) * a[:, None, :], 2)
    return sums * scales[:, None] if CODED else sums


@triton.jit
def load_squares(squares, COUNT: tl.constexpr, COUNT_UP: tl.constexpr):
    """Parts of the sum of squares; asked for with the input, and added when the product is done."""
    part = tl.arange(0, COUNT_UP)
    return tl.load(squares + part, mask=part < COUNT, other=0.0)


@triton.jit
def find_factor(squares, K, eps):
    """1 / rms from parts of the sum of squares."""
    return tl.rsqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def store_stream(y, at, row, rows, gains, scaled, part):
    """A Stream's share of a program: y are rows `row` of x, `gains` the next norm's weights there."""
    tl.store(at + row, y, mask=row < rows)
    tl.store(scaled + row, y * gains, mask=row < rows)
    tl.store(part, tl.sum(tl.where(row < rows, y * y, 0.0), 0))


@triton.jit
def run_rows(
    x, gain, eps, residual, out, w, scale, rows, K, first, turn, next_gain, scaled, part,
    BN: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, HELD: tl.constexpr, CODED: tl.constexpr,
    NORM: tl.constexpr, COUNT: tl.constexpr, COUNT_UP: tl.constexpr, RESIDUAL: tl.constexpr, STREAM: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """out[turn + row] = norm(x) @ w[row] + residual[turn + row] for BN rows from `first` on. With NORM = AHEAD, x is a
    Stream's `scaled` and `gain` its `squares`."""
    row = first + tl.arange(0, BN)
    scale += (first // 128) * tl.cdiv(K, 128)
    held, factors = (), ()
    for i in tl.static_range(HELD):
        held = held + (load_strip(w, row, rows, i * STRIP, K, STRIP, EVEN),)
        factors = factors + (load_scales(scale, i * STRIP, K, STRIP, CODED),)
    if STREAM:
        gains = tl.load(next_gain + turn + row, mask=row < rows, other=0.0)
    wait(PDL)
    if RESIDUAL:  # asked for with the input: behind the product it would be waited for
        before = tl.load(residual + turn + row, mask=row < rows, other=0.0)
    sums = tl.zeros([STRIP // QUAD, BN], tl.float32)
    squares = tl.zeros([STRIP // QUAD], tl.float32)
    if NORM == AHEAD:
        squares = load_squares(gain, COUNT, COUNT_UP)
    for i in tl.static_range(STRIPS):
        a = load_sum(x, i * STRIP, K, STRIP, EVEN, PARTS)
        if NORM == INSIDE:
            squares += tl.sum(a * a, 1)
            a = a * load_input(gain, i * STRIP, K, STRIP, EVEN)
        if i < HELD:
            sums += multiply_strip(held[i], a, factors[i], CODED)
        else:
            scales = load_scales(scale, i * STRIP, K, STRIP, CODED)
            sums += multiply_strip(load_strip(w, row, rows, i * STRIP, K, STRIP, EVEN), a, scales, CODED)
    y = tl.sum(sums, 0)
    if NORM != NOT:
        y = y * find_factor(squares, K, eps)
    if RESIDUAL:
        y += before
    if STREAM:
        store_stream(y, out + turn, row, rows, gains, scaled + turn, part)
    else:
        tl.store(out + turn + row, y, mask=row < rows)


@triton.jit
def _multiply(
    x, gain, residual, out, w0, s0, w1, s1, w2, s2, next_gain, scaled, parts, rows0, rows1, rows2, K, x_stride,
    out_stride, eps,
    PROGRAMS0: tl.constexpr, PROGRAMS1: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr, BN2: tl.constexpr,
    STRIP: tl.constexpr, STRIPS: tl.constexpr, HELD: tl.constexpr, CODED0: tl.constexpr, CODED1: tl.constexpr,
    CODED2: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr, COUNT_UP: tl.constexpr, STREAM: tl.constexpr,
    RESIDUAL: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program, token = tl.program_id(0), tl.program_id(1)
    x += token * x_stride
    out += token * out_stride
    residual += token * out_stride
    if program < PROGRAMS0:
        run_rows(x, gain, eps, residual, out, w0, s0, rows0, K, program * BN0, 0, next_gain,
                 scaled, parts + program, BN0, STRIP, STRIPS, HELD, CODED0, NORM, COUNT, COUNT_UP, RESIDUAL, STREAM,
                 EVEN, PDL, PARTS)  # fmt: skip
    elif program < PROGRAMS0 + PROGRAMS1:
        run_rows(x, gain, eps, residual, out, w1, s1, rows1, K, (program - PROGRAMS0) * BN1, rows0, next_gain,
                 scaled, parts + program, BN1, STRIP, STRIPS, HELD, CODED1, NORM, COUNT, COUNT_UP, RESIDUAL, STREAM,
                 EVEN, PDL, PARTS)  # fmt: skip
    else:
        run_rows(x, gain, eps, residual, out, w2, s2, rows2, K, (program - PROGRAMS0 - PROGRAMS1) * BN2, rows0 + rows1,
                 next_gain, scaled, parts + program, BN2, STRIP, STRIPS, HELD, CODED2, NORM, COUNT, COUNT_UP, RESIDUAL,
                 STREAM, EVEN, PDL, PARTS)  # fmt: skip


class Operand(NamedTuple):
    """A matrix as the kernels take it."""

    data: Tensor  # u8 codes, or bf16 or f32 numbers [rows, k]
    scale: Tensor  # f32; unused without codes
    is_coded: bool


def as_operand(w: Part) -> Operand:
    """Raises ValueError for codes that these kernels do not read: the plan keeps e4m3 by 128x128 only."""
    if isinstance(w, Tensor) or w.scale is None:
        data = w if isinstance(w, Tensor) else w.data
        return Operand(data, data, False)
    if w.code != "e4m3" or w.group != (BLOCK, BLOCK) or w.global_scale is not None:
        raise ValueError(f"a {w.code} matrix with groups of {w.group}: expected e4m3 by {(BLOCK, BLOCK)}, or numbers")
    return Operand(w.data.view(torch.uint8), w.scale, True)


class Cut(NamedTuple):
    """How rows of k columns are cut into strips."""

    width: int
    strips: int
    held: int
    is_even: bool  # whether the strips end where the rows do

    @property
    def warps(self) -> int:
        return max(1, self.width // BLOCK)


def cut(k: int, widest: int | None = None) -> Cut:
    """The widest strips that divide k; if none does, strips that overhang."""
    width = min(widest or WIDEST, max(BLOCK, triton.next_power_of_2(k)))
    while width > 512 and k % width:
        width //= 2
    strips = -(-k // width)
    return Cut(width, strips, min(strips, MOST_STRIPS), k % width == 0)


def count_rows(operand: Operand, how: Cut, tile_bytes: int) -> int:
    """Rows a program takes: as many as fill its tile, between 1 and 32."""
    row_bytes = how.width * how.held * operand.data.element_size()
    return max(1, min(32, 1 << (tile_bytes // row_bytes).bit_length() - 1)) if tile_bytes >= row_bytes else 1


def multiply(
    x: Tensor | Stream,
    parts: Sequence[Part],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    tile_bytes: int | None = None,
    widest: int | None = None,
) -> Tensor:
    """f32 [T, rows of all parts] = norm(x) [T, k] @ part.T, side by side, plus `residual` of the same shape.

    One to three parts with k columns each. Reads the weights once for every token: meant for T = 1. A Stream was
    prepared for the norm that is asked for.
    """
    return _launch(x, parts, norm, residual, None, tile_bytes, widest)[0]


def multiply_into(x: Tensor, part: Part, residual: Tensor, following: Norm) -> Stream:
    """The sum of the rows of x [n, k], times part.T, + residual [1, rows], prepared for the norm that follows: for one
    token, whose input comes in n parts."""
    assert x.is_contiguous() and len(residual) == 1, f"{tuple(x.shape)} in strides {x.stride()}: one token's parts"
    out, scaled, squares = _launch(x, [part], None, residual, following, None, None)
    return Stream(out, scaled, squares)


def _launch(
    x: Tensor | Stream, parts: Sequence[Part], norm: Norm | None, residual: Tensor | None, following: Norm | None,
    tile_bytes: int | None, widest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operands = [as_operand(part) for part in parts]
    given, gain, count, mode = take_input(x, norm)
    k = given.shape[1]
    is_small = sum(o.data.nbytes for o in operands) < MANY_BYTES
    how = cut(k, widest or (WIDEST if is_small else NARROW))
    tile_bytes = tile_bytes or (SMALL_TILE_BYTES if is_small else TILE_BYTES)
    rows = [o.data.shape[0] for o in operands]
    tiles = [count_rows(o, how, min(LATER_TILE_BYTES, tile_bytes) if i else tile_bytes) for i, o in enumerate(operands)]
    programs = [-(-n // tile) for n, tile in zip(rows, tiles, strict=True)]
    while len(operands) < 3:
        operands.append(operands[0])
        rows.append(0)
        tiles.append(1)
        programs.append(0)
    tokens, uses = given.shape[0] if following is None else 1, uses_pdl(given)
    out = torch.empty(tokens, sum(rows), dtype=torch.float32, device=given.device)
    scaled, squares = (torch.empty_like(out), out.new_empty(tokens, sum(programs))) if following else (out, out)
    _multiply[sum(programs), tokens](
        given, gain, out if residual is None else residual, out,
        *[t for o in operands for t in (o.data, o.scale)], following.weight if following else out, scaled, squares,
        *rows, k, given.stride(0), out.stride(0), norm.eps if norm else 0.0,
        PROGRAMS0=programs[0], PROGRAMS1=programs[1], BN0=tiles[0], BN1=tiles[1], BN2=tiles[2],
        STRIP=how.width, STRIPS=how.strips, HELD=how.held, CODED0=operands[0].is_coded, CODED1=operands[1].is_coded,
        CODED2=operands[2].is_coded, NORM=mode, COUNT=count, COUNT_UP=triton.next_power_of_2(count),
        STREAM=following is not None, RESIDUAL=residual is not None, PARTS=given.shape[0] // tokens, EVEN=how.is_even,
        PDL=uses, num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out, scaled, squares


def take_input(x: Tensor | Stream, norm: Norm | None) -> tuple[Tensor, Tensor, int, int]:
    """(input, gain or squares, how many squares, where the norm comes from) for a kernel."""
    if norm is None:
        assert isinstance(x, Tensor), "a stream is prepared for a norm"
        return x, x, 1, NOT.value
    if isinstance(x, Stream):
        return x.scaled, x.squares, x.squares.shape[1], AHEAD.value
    return x, norm.weight, 1, INSIDE.value
