"""Matrix times 2 vectors: as rows.py, each weight decoded once and multiplied with every token's input.

Fp32 FMAs round nothing and need no second launch that rewrites the input for tensor cores: 2 us less than skinny.py.
With 4 tokens sums fill the registers, and it takes 5 to 20 us longer. Reference: `linear`, `rms_norm` in reference.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.rows import MANY_BYTES, NARROW
from saccade.kernels.stream import Norm
from saccade.kernels.strips import WIDEST, Part, as_operand, cut, load_input, load_scales, load_strip, to_numbers

MOST_SEVERAL = 2  # tokens
ROW_BYTES = 8  # rows of a program: 8 of codes, 4 in BF16


@triton.jit
def _run_rows(
    x, gain, eps, residual, out, w, scale, rows, K, first, turn, x_stride, out_stride, TOKENS: tl.constexpr,
    BN: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, HELD: tl.constexpr, CODED: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[:, turn + row] = norm(x) @ w[row] + residual[:, turn + row] for BN rows from `first` on."""
    row = first + tl.arange(0, BN)
    scale += (first // 128) * tl.cdiv(K, 128)
    held, factors = (), ()
    for i in tl.static_range(HELD):
        held = held + (load_strip(w, row, rows, i * STRIP, K, STRIP, EVEN),)
        factors = factors + (load_scales(scale, i * STRIP, K, STRIP, CODED),)
    wait(PDL)
    sums, squares = (), ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([STRIP // 4, BN], tl.float32),)
        squares = squares + (tl.zeros([STRIP // 4], tl.float32),)
    for i in tl.static_range(STRIPS):
        numbers = to_numbers(held[i] if i < HELD else load_strip(w, row, rows, i * STRIP, K, STRIP, EVEN), CODED)
        weight = load_input(gain, i * STRIP, K, STRIP, EVEN) if NORM else tl.full([STRIP // 4, 4], 1.0, tl.float32)
        sums_before, squares_before, sums, squares = sums, squares, (), ()
        for t in tl.static_range(TOKENS):
            a = load_input(x + t * x_stride, i * STRIP, K, STRIP, EVEN)
            squares = squares + (squares_before[t] + tl.sum(a * a, 1),)
            if NORM:
                a = a * weight
            a = a * (factors[i] if i < HELD else load_scales(scale, i * STRIP, K, STRIP, CODED))[:, None]
            sums = sums + (sums_before[t] + tl.sum(numbers * a[:, None, :], 2),)
    for t in tl.static_range(TOKENS):
        y = tl.sum(sums[t], 0)
        if NORM:
            y = y * tl.rsqrt(tl.sum(squares[t], 0) / K + eps)
        at = t * out_stride + turn + row
        if RESIDUAL:
            y += tl.load(residual + at, mask=row < rows, other=0.0)
        tl.store(out + at, y, mask=row < rows)


@triton.jit
def multiply_tokens(
    x, gain, residual, out, w0, s0, w1, s1, w2, s2, rows0, rows1, rows2, K, x_stride, out_stride, eps,
    TOKENS: tl.constexpr, PROGRAMS0: tl.constexpr, PROGRAMS1: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr,
    BN2: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, HELD: tl.constexpr, CODED0: tl.constexpr,
    CODED1: tl.constexpr, CODED2: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program = tl.program_id(0)
    if program < PROGRAMS0:
        _run_rows(x, gain, eps, residual, out, w0, s0, rows0, K, program * BN0, 0, x_stride, out_stride, TOKENS, BN0,
                  STRIP, STRIPS, HELD, CODED0, NORM, RESIDUAL, EVEN, PDL)  # fmt: skip
    elif program < PROGRAMS0 + PROGRAMS1:
        _run_rows(x, gain, eps, residual, out, w1, s1, rows1, K, (program - PROGRAMS0) * BN1, rows0, x_stride,
                  out_stride, TOKENS, BN1, STRIP, STRIPS, HELD, CODED1, NORM, RESIDUAL, EVEN, PDL)  # fmt: skip
    else:
        _run_rows(x, gain, eps, residual, out, w2, s2, rows2, K, (program - PROGRAMS0 - PROGRAMS1) * BN2,
                  rows0 + rows1, x_stride, out_stride, TOKENS, BN2, STRIP, STRIPS, HELD, CODED2, NORM, RESIDUAL, EVEN,
                  PDL)  # fmt: skip


def multiply_several(
    x: Tensor,
    parts: Sequence[Part],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    widest: int | None = None,
) -> Tensor:
    """f32 [T, rows of all parts] = norm(x) [T, k] @ part.T, side by side, plus `residual` of the same shape.

    One to three parts, T up to MOST_SEVERAL. Raises ValueError for codes that rows.py does not read.
    """
    operands = [as_operand(part) for part in parts]
    tokens, k = x.shape
    how = cut(k, widest or (WIDEST if sum(o.data.nbytes for o in operands) < MANY_BYTES or k < 4096 else NARROW))
    rows = [o.data.shape[0] for o in operands]
    tiles = [max(1, ROW_BYTES // o.data.element_size()) for o in operands]
    programs = [-(-n // tile) for n, tile in zip(rows, tiles, strict=True)]
    while len(operands) < 3:
        operands.append(operands[0])
        rows.append(0)
        tiles.append(1)
        programs.append(0)
    out = torch.empty(tokens, sum(rows), dtype=torch.float32, device=x.device)
    uses = uses_pdl(x)
    multiply_tokens[(sum(programs),)](
        x, norm.weight if norm else x, out if residual is None else residual, out,
        *[t for o in operands for t in (o.data, o.scale)], *rows, k, x.stride(0), out.stride(0),
        norm.eps if norm else 0.0, TOKENS=tokens, PROGRAMS0=programs[0], PROGRAMS1=programs[1], BN0=tiles[0],
        BN1=tiles[1], BN2=tiles[2], STRIP=how.width, STRIPS=how.strips, HELD=how.held, CODED0=operands[0].is_coded,
        CODED1=operands[1].is_coded, CODED2=operands[2].is_coded, NORM=norm is not None,
        RESIDUAL=residual is not None, EVEN=how.is_even, PDL=uses, num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out
