"""Matrix times vector, for one or two tokens. Most of a decode step is this; its limit is the bytes of the weights.

A program owns a few whole rows. It asks for all of their weights at once, before the kernel waits for its input, so
that memory is busy while the last kernel ends. Products are fp32 FMAs, which round nothing. Several matrices with the
same input share a launch. The RMS norm in front costs no pass: its factor is applied to the finished sums. A second
token has its own programs, each beside the first token's, so that memory is read once.

Reference: `linear` and `rms_norm` in reference.py. Serves up to GEMV_TOKENS tokens; weights in FP8 by 128 x 128, BF16
or F32. Measured: 17.9 MB with chunks of 512 columns, 1.3 us less than with 1,024. Next: row_chunks.py, residual.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.linear.row_chunks import (
    QUAD,
    WIDEST,
    Chunking,
    StoredMatrix,
    as_stored,
    count_program_rows,
    find_chunking,
    load_chunk,
    load_input,
    load_scales,
    load_sum,
    multiply_chunk,
)
from saccade.kernels.residual import (
    AHEAD,
    INSIDE,
    NOT,
    Input,
    PreparedResidual,
    find_factor,
    load_squares,
    store_residual,
    take_input,
)
from saccade.kernels.types import Matrix, Norm


class GemvConfig(NamedTuple):
    """How the work is divided."""

    tile_bytes: int  # of weights that a program holds
    widest: int  # columns of a chunk, at most
    # The tile of a matrix behind the first: small programs fill up the multiprocessors that have one fewer of the large
    # ones. wk and weights_proj by single rows instead of four save 1 us a layer.
    later_tile_bytes: int = 14336


# Many programs of 4 warps (1.3 us less for 17.9 MB) want bytes enough for all multiprocessors; below, few of 8 are
# faster (3.2 -> 2.4 us for 3.7 MB). With half of the tile q_a, kv_a and wk take 0.5 us more; where there are few
# programs, 128 for the router instead of 64 take 2.1 us, not 2.5.
GEMV_LONG, GEMV_SHORT = GemvConfig(57344, 512), GemvConfig(28672, WIDEST)
LONG_GEMV_BYTES = 8 << 20  # of all matrices, from which GEMV_LONG is faster


@triton.jit
def run_rows(
    x, gain, eps, residual, out, w, scale, rows, K, first, turn, next_gain, scaled, part,
    BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr, CODED: tl.constexpr,
    NORM: tl.constexpr, COUNT: tl.constexpr, COUNT_UP: tl.constexpr, RESIDUAL: tl.constexpr, STREAM: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, apart=0, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """out[turn + row] = norm(x) @ w[row] + residual[turn + row] for BN rows from `first` on. With NORM = AHEAD, x is a
    PreparedResidual's `scaled` and `gain` its `squares`. x is the sum of PARTS rows, `apart` from each other."""
    row = first + tl.arange(0, BN)
    scale += (first // 128) * tl.cdiv(K, 128)
    held, factors = (), ()
    for i in tl.static_range(HELD):
        held = held + (load_chunk(w, row, rows, i * CHUNK, K, CHUNK, EVEN),)
        factors = factors + (load_scales(scale, i * CHUNK, K, CHUNK, CODED),)
    if STREAM:
        gains = tl.load(next_gain + turn + row, mask=row < rows, other=0.0)
    wait(PDL)
    if RESIDUAL:  # asked for with the input: behind the product it would be waited for
        before = tl.load(residual + turn + row, mask=row < rows, other=0.0)
    sums = tl.zeros([CHUNK // QUAD, BN], tl.float32)
    squares = tl.zeros([CHUNK // QUAD], tl.float32)
    if NORM == AHEAD:
        squares = load_squares(gain, COUNT, COUNT_UP)
    for i in tl.static_range(CHUNKS):
        a = load_sum(x, apart, i * CHUNK, K, CHUNK, EVEN, PARTS)
        if NORM == INSIDE:
            squares += tl.sum(a * a, 1)
            a = a * load_input(gain, i * CHUNK, K, CHUNK, EVEN)
        if i < HELD:
            sums += multiply_chunk(held[i], a, factors[i], CODED)
        else:
            scales = load_scales(scale, i * CHUNK, K, CHUNK, CODED)
            sums += multiply_chunk(load_chunk(w, row, rows, i * CHUNK, K, CHUNK, EVEN), a, scales, CODED)
    y = tl.sum(sums, 0)
    if NORM != NOT:
        y = y * find_factor(squares, K, eps)
    if RESIDUAL:
        y += before
    if STREAM:
        store_residual(y, out + turn, row, rows, gains, scaled + turn, part)
    else:
        tl.store(out + turn + row, y, mask=row < rows)


@triton.jit
def _multiply(
    x, gain, residual, out, w0, s0, w1, s1, w2, s2, next_gain, scaled, parts, rows0, rows1, rows2, K, x_stride,
    out_stride, eps,
    PROGRAMS0: tl.constexpr, PROGRAMS1: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr, BN2: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr, CODED0: tl.constexpr, CODED1: tl.constexpr,
    CODED2: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr, COUNT_UP: tl.constexpr, STREAM: tl.constexpr,
    RESIDUAL: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program, token = tl.program_id(0) // TOKENS, tl.program_id(0) % TOKENS
    x += token * x_stride
    out += token * out_stride
    residual += token * out_stride
    apart = TOKENS * x_stride
    if NORM == AHEAD:
        gain += token * COUNT
    if STREAM:
        scaled += token * out_stride
        parts += token * (tl.num_programs(0) // TOKENS)
    if program < PROGRAMS0:
        run_rows(x, gain, eps, residual, out, w0, s0, rows0, K, program * BN0, 0, next_gain,
                 scaled, parts + program, BN0, CHUNK, CHUNKS, HELD, CODED0, NORM, COUNT, COUNT_UP, RESIDUAL, STREAM,
                 EVEN, PDL, apart, PARTS)  # fmt: skip
    elif program < PROGRAMS0 + PROGRAMS1:
        run_rows(x, gain, eps, residual, out, w1, s1, rows1, K, (program - PROGRAMS0) * BN1, rows0, next_gain,
                 scaled, parts + program, BN1, CHUNK, CHUNKS, HELD, CODED1, NORM, COUNT, COUNT_UP, RESIDUAL, STREAM,
                 EVEN, PDL, apart, PARTS)  # fmt: skip
    else:
        run_rows(x, gain, eps, residual, out, w2, s2, rows2, K, (program - PROGRAMS0 - PROGRAMS1) * BN2, rows0 + rows1,
                 next_gain, scaled, parts + program, BN2, CHUNK, CHUNKS, HELD, CODED2, NORM, COUNT, COUNT_UP, RESIDUAL,
                 STREAM, EVEN, PDL, apart, PARTS)  # fmt: skip


def run_gemv(
    x: Input,
    parts: Sequence[Matrix],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """f32 [T, rows of all parts] = norm(x) [T, k] @ part.T, side by side, plus `residual` of the same shape.

    One to three parts with k columns each, T up to GEMV_TOKENS: each token's programs read the weights, and the L2
    cache serves the second token. A PreparedResidual was prepared for the norm that is asked for.
    """
    return _launch(x, parts, norm, residual, None, config)[0]


def run_gemv_into(x: Tensor, part: Matrix, residual: Tensor, following: Norm) -> PreparedResidual:
    """x [T, k] @ part.T + residual [T, rows], prepared for the norm that follows; T up to GEMV_TOKENS.

    x may be [n * T, k]: then the sum of its n parts is multiplied.
    """
    assert len(x) % len(residual) == 0, f"{tuple(x.shape)}: expected all parts of {len(residual)} tokens"
    out, scaled, squares = _launch(x, [part], None, residual, following, None)
    return PreparedResidual(out, scaled, squares)


class RowPrograms(NamedTuple):
    """Matrices of one input, and the programs that share their rows."""

    matrices: list[StoredMatrix]
    chunking: Chunking
    rows: list[int]  # of each matrix
    tiles: list[int]  # rows of a program of each
    programs: list[int]  # of each

    def fill_up(self, count: int) -> "RowPrograms":
        """As many matrices as a kernel has parameters for; those that are added have no rows."""
        more = count - len(self.matrices)
        none = [0] * more
        return self._replace(
            matrices=self.matrices + self.matrices[:1] * more, rows=self.rows + none, tiles=self.tiles + [1] * more,
            programs=self.programs + none,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [t for m in self.matrices for t in (m.data, m.scale)]


def divide_rows(matrices: list[StoredMatrix], k: int, how: GemvConfig) -> RowPrograms:
    """Programs for matrices of k columns."""
    chunking = find_chunking(k, how.widest)
    rows = [m.data.shape[0] for m in matrices]
    sizes = [min(how.later_tile_bytes, how.tile_bytes) if i else how.tile_bytes for i in range(len(matrices))]
    tiles = [count_program_rows(m, chunking, size) for m, size in zip(matrices, sizes, strict=True)]
    return RowPrograms(matrices, chunking, rows, tiles, [-(-n // tile) for n, tile in zip(rows, tiles, strict=True)])


def _launch(
    x: Input, parts: Sequence[Matrix], norm: Norm | None, residual: Tensor | None, following: Norm | None,
    config: GemvConfig | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given, gain, count, mode = take_input(x, norm)
    matrices, k = [as_stored(part) for part in parts], given.shape[1]
    is_long = sum(m.data.nbytes for m in matrices) >= LONG_GEMV_BYTES
    shared = divide_rows(matrices, k, config or (GEMV_LONG if is_long else GEMV_SHORT)).fill_up(3)
    how, coded = shared.chunking, [m.is_coded for m in shared.matrices]
    tokens, uses = given.shape[0] if following is None or residual is None else len(residual), uses_pdl(given)
    out = torch.empty(tokens, sum(shared.rows), dtype=torch.float32, device=given.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous()), "a residual like the result"
    scaled, squares = (torch.empty_like(out), out.new_empty(tokens, sum(shared.programs))) if following else (out, out)
    _multiply[tokens * sum(shared.programs),](
        given, gain, out if residual is None else residual, out, *shared.tensors(),
        following.weight if following else out, scaled, squares, *shared.rows, k, given.stride(0), out.stride(0),
        norm.eps if norm else 0.0, PROGRAMS0=shared.programs[0], PROGRAMS1=shared.programs[1], BN0=shared.tiles[0],
        BN1=shared.tiles[1], BN2=shared.tiles[2], CHUNK=how.width, CHUNKS=how.chunks, HELD=how.held, CODED0=coded[0],
        CODED1=coded[1], CODED2=coded[2], NORM=mode, COUNT=count, COUNT_UP=triton.next_power_of_2(count),
        STREAM=following is not None, RESIDUAL=residual is not None, PARTS=given.shape[0] // tokens, EVEN=how.is_even,
        TOKENS=tokens, PDL=uses, num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out, scaled, squares
