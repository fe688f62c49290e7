"""Activations as tensor cores take them: two 16-bit numbers, x = high + low; or one, or an FP8 code.

Weights are exact in 16 bits, activations are not. One BF16 number keeps 8 bits of an activation, two keep 16, two FP16
numbers keep 22. FP16 has a narrow range. So each row is multiplied by a power of two that takes its largest number to
[2^14, 2^15); the end of the product divides by it, exactly. The same pass applies what stands in front of a product: an
RMS norm, or silu(gate) * up.

What is rounded to BF16 for weights in FP8 is written in FP16 too, which holds it: codes become FP16 in a sixth of the
conversions that BF16 takes. FP8 codes have a power of two for each 128 columns of a row.

Reference: `rms_norm`, `silu_and_mul` and `round_inputs` in reference.py. Serves any number of tokens,
rows of up to 32,768 columns. Next: linear/gemm.py, linear/split_k.py, moe/grouped_gemm.py.
"""

import math
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import IS_INTERPRETED, begin, uses_pdl, wait

INTERPRETED = tl.constexpr(IS_INTERPRETED)

FP8_COLUMNS = 128  # of a row, that share a scale
WARP_COLUMNS = 1024  # of a warp
MOST_WARPS = 32  # of a program, which holds its rows: 32 registers a thread up to 32,768 columns


class Split(NamedTuple):
    """x [rows, K] in 16 bits, x = (high + low) * unit; what is not asked for is an empty tensor, and has neither."""

    numbers: Tensor  # [2, rows, K], high and low; or [1, rows, K], high. With `pad` there is room for more rows
    unit: Tensor  # f32 [rows]; empty for BF16, whose unit is 1

    @property
    def high(self) -> Tensor:
        return self.numbers[0]

    @property
    def low(self) -> Tensor:
        return self.numbers[1]


@triton.jit
def exponent(largest):
    """The biased exponent of f32 numbers >= 0."""
    return largest.to(tl.int32, bitcast=True) >> 23


@triton.jit
def power_of_two(biased):
    """2^(biased - 127), a normal number whatever `biased`."""
    return (tl.minimum(tl.maximum(biased, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_in_two(x, dtype: tl.constexpr):
    """x f32 = high + low."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def find_fp8_scale(largest):
    """2^ceil(log2(largest / 448)), as `quantize_rows` in reference.py."""
    bits = tl.maximum(largest, 1e-4).to(tl.int32, bitcast=True)
    return (((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, total):
    """total + a @ b in fp32. The interpreter multiplies no BF16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total)


@triton.jit
def clamp_gate(gate, up, LIMIT: tl.constexpr):
    """gate at most LIMIT, and up within it; what is no number stays none."""
    if float("inf") > LIMIT:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def find_permuted(column):
    """Where a permuted row of FP16 numbers has a column: of sixteen 0 1 4 5 8 9 12 13, then 2 3 6 7 10 11 14 15."""
    return column // 16 * 16 + column % 4 // 2 * 8 + column % 16 // 4 * 2 + column % 2


@triton.jit
def dot_permuted(numbers, x, total):
    """total + numbers @ x for decoded codes [rows, columns] and x [columns, tokens], whose rows were written permuted.

    A thread of a tensor core product takes columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each sixteen of its left
    operand: of bytes in shared memory two at a time. It may as well take 4 t to 4 t + 3, if the right operand has its
    rows in the order that results: then a warp needs 4 ldmatrix for 128 columns instead of 32 loads of two bytes.
    """
    rows: tl.constexpr = numbers.shape[0]
    columns: tl.constexpr = numbers.shape[1]
    fours = tl.reshape(numbers, [rows, columns // 16, 4, 2, 2])
    return dot(tl.reshape(tl.permute(fours, (0, 1, 3, 2, 4)), [rows, columns]), x, total)


@triton.jit
def write_split_rows(
    program, x, weight, eps, fp32, fp16, unit, bf16, rounded, fp8, fp8_scale, counters, stride, rows, room, counted,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, FP32: tl.constexpr,
    FP16: tl.constexpr, BF16: tl.constexpr, BF16_LOW: tl.constexpr, ROUNDED: tl.constexpr, FP8: tl.constexpr,
    ROWS_OF_COUNTERS: tl.constexpr, APART: tl.constexpr, PERMUTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program ROWS rows, read once. Also clears the counters of the product that follows."""
    wait(PDL)
    index = program * ROWS + tl.arange(0, ROWS)
    here = (index < rows)[:, None]
    row = index.to(tl.int64)[:, None] * stride
    out = index.to(tl.int64)[:, None] * K
    if ROWS_OF_COUNTERS > 0 and program == 0:
        counter = tl.arange(0, ROWS_OF_COUNTERS)
        tl.store(counters + counter, tl.zeros([ROWS_OF_COUNTERS], tl.int32), mask=counter < counted)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = here & (columns < K)
    value = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + row + K + columns, mask=mask, other=0.0).to(tl.float32)
        value, up = clamp_gate(value, up, LIMIT)
        value = value / (1 + tl.exp(-value)) * up
    if NORM:
        square = tl.sum(value * value, 1) / K
        factor = (tl.math.rsqrt(square + eps) + square * 0.0)[:, None]  # as residual.find_factor
        value = value * factor * tl.load(weight + columns, mask=columns < K, other=0.0)
    column = columns
    if APART > 1:
        column = columns // APART + columns % APART * (K // APART)
    place, behind = out + column, room.to(tl.int64) * K
    if FP32:
        tl.store(fp32 + place, value, mask=mask)
    if BF16:
        high, low = split_in_two(value, tl.bfloat16)
        tl.store(bf16 + place, high, mask=mask)
        if BF16_LOW:
            tl.store(bf16 + behind + place, low, mask=mask)
    if FP8:
        WIDTH: tl.constexpr = 128 if BLOCK >= 128 else BLOCK
        groups = tl.reshape(value, [ROWS, BLOCK // WIDTH, WIDTH])
        # NaN where a number is not finite: `max` drops a NaN, and an infinite number would be the code of 448.
        scales = find_fp8_scale(tl.max(tl.abs(groups), 2)) + tl.sum(groups * 0.0, 2)
        group = tl.arange(0, BLOCK // WIDTH)[None, :]
        inside = (index < rows)[:, None] & (group < (K + 127) // 128)
        tl.store(fp8_scale + index.to(tl.int64)[:, None] * ((K + 127) // 128) + group, scales, mask=inside)
        codes = tl.reshape(groups * (1.0 / scales)[:, :, None], [ROWS, BLOCK])  # exact, as scales are powers of two
        tl.store(fp8 + out + columns, codes.to(fp8.dtype.element_ty), mask=mask)
    if FP16 or ROUNDED:
        # 2^14 / 2^e and its inverse, both normal numbers: a row of zeros has e = 0, an infinite one 255.
        power = tl.minimum(tl.maximum(268 - exponent(tl.max(tl.abs(value), 1)), 1), 253)
        tl.store(unit + index, power_of_two(254 - power), mask=index < rows)
        if PERMUTED:
            place = out + find_permuted(column)
        if FP16:
            high, low = split_in_two(value * power_of_two(power)[:, None], tl.float16)
            tl.store(fp16 + place, high, mask=mask)
            tl.store(fp16 + behind + place, low, mask=mask)
        if ROUNDED:
            once = value.to(tl.bfloat16).to(tl.float32) * power_of_two(power)[:, None]
            tl.store(rounded + place, once.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["rows", "room", "counted"])
def write_splits(
    x, weight, eps, fp32, fp16, unit, bf16, rounded, fp8, fp8_scale, counters, stride, rows, room, counted,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, FP32: tl.constexpr,
    FP16: tl.constexpr, BF16: tl.constexpr, BF16_LOW: tl.constexpr, ROUNDED: tl.constexpr, FP8: tl.constexpr,
    ROWS_OF_COUNTERS: tl.constexpr, APART: tl.constexpr, PERMUTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    write_split_rows(tl.program_id(0), x, weight, eps, fp32, fp16, unit, bf16, rounded, fp8, fp8_scale, counters,
                     stride, rows, room, counted, K, NORM, GATED, LIMIT, FP32, FP16, BF16, BF16_LOW, ROUNDED, FP8,
                     ROWS_OF_COUNTERS, APART, PERMUTED, ROWS, BLOCK, PDL)  # fmt: skip


class Beside(NamedTuple):
    """Other work in the launch of `write_activations`: a kernel with the parameters of write_splits and its own behind
    them, and how many programs more it needs."""

    kernel: Any
    programs: int
    arguments: Sequence[Tensor | int | float]
    constants: Mapping[str, int | bool]


class Formats(NamedTuple):
    """What a product wants of its input: f32 numbers, two in FP16 of each, one or two in BF16, one in FP16 that is a
    BF16 number, or a code."""

    fp32: bool = False
    fp16: bool = False
    bf16: int = 0
    rounded: bool = False
    fp8: bool = False


class Codes(NamedTuple):
    """x [rows, K] as e4m3 codes, 128 columns times a scale."""

    numbers: Tensor  # [rows, K]
    scales: Tensor  # f32 [rows, ceil(K / 128)]


class Activations(NamedTuple):
    """What `write_activations` was asked for, else empty."""

    fp32: Tensor  # f32 [..., K]
    fp16: Split
    bf16: Split
    rounded: Split  # in FP16, of one number
    fp8: Codes


def write_activations(
    x: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    limit: float = inf,
    fp32: bool = False,
    fp16: bool = False,
    bf16: int = 0,
    rounded: bool = False,
    fp8: bool = False,
    pad: int = 0,
    apart: int = 1,
    permuted: bool = False,
    counters: Tensor | None = None,
    beside: Beside | None = None,
) -> Activations:
    """One pass over x [..., K], or [..., 2 K] if `gated` (then silu of its first half times the second is meant,
    within the `limit` of `silu_and_mul`).

    norm: the weight [K] and epsilon of an RMS norm to apply. fp32: write the f32 numbers too. fp16: two numbers in
    FP16 of each. bf16: numbers in BF16 of each, 0 to 2. rounded: one number in FP16, after rounding to BF16. fp8: codes
    with scales. pad: rows of room for each of high and low, which then lie
    behind one another. apart: of each row, columns 0, apart, 2 * apart, ... before 1, apart + 1, ...: as weights are
    read of which so many share an element. permuted: FP16 numbers in the order in which `dot_permuted` takes them.
    counters: i32 to be zeroed. beside: what else this launch does.
    """
    if x.stride(-1) != 1 or (x.ndim > 2 and not x.is_contiguous()):
        x = x.contiguous()
    shape = (*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])
    rows, width = math.prod(shape[:-1]), shape[-1]
    assert not permuted or width // apart % 16 == 0, f"columns are permuted by sixteen, found {width // apart}"
    room = pad or rows
    empty = x.new_empty(0)

    def allot(parts: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(parts, room, width, dtype=dtype, device=x.device) if parts else empty

    out = torch.empty(shape, dtype=torch.float32, device=x.device) if fp32 else empty
    halves, bf16s = allot(2 * fp16, torch.float16), allot(bf16, torch.bfloat16)
    once, codes = allot(int(rounded), torch.float16), allot(int(fp8), torch.float8_e4m3fn)
    unit = torch.empty(rows, dtype=torch.float32, device=x.device) if fp16 or rounded else empty
    scales = torch.empty(rows, -(-width // FP8_COLUMNS), dtype=torch.float32, device=x.device) if fp8 else empty
    block = triton.next_power_of_2(width)
    count = 0 if counters is None else counters.shape[0]
    pdl = uses_pdl(x)
    each = max(1, min(2048 // block, triton.next_power_of_2(rows)))
    kernel, programs, more, constants = beside or Beside(write_splits, 0, (), {})
    kernel[(programs + triton.cdiv(rows, each),)](
        x, norm[0] if norm else empty, norm[1] if norm else 0.0, out, halves, unit, bf16s, once, codes, scales,
        empty if counters is None else counters, x.stride(-2) if x.ndim > 1 else width, rows, room, count,
        *more, **constants, K=width, NORM=norm is not None, GATED=gated, LIMIT=limit, FP32=fp32, FP16=fp16,
        BF16=bf16 > 0, BF16_LOW=bf16 > 1, ROUNDED=rounded, FP8=fp8, APART=apart, PERMUTED=permuted, ROWS=each,
        BLOCK=block, PDL=pdl, ROWS_OF_COUNTERS=triton.next_power_of_2(count) if count else 0,
        num_warps=max(1, min(MOST_WARPS, each * block // WARP_COLUMNS)), launch_pdl=pdl,
    )  # fmt: skip
    return Activations(
        out, Split(halves, unit), Split(bf16s, empty), Split(once, unit), Codes(codes[0] if fp8 else codes, scales)
    )


def prepare_activations(
    x: Tensor,
    *forms: Formats,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    limit: float = inf,
    beside: Beside | None = None,
) -> Activations:
    """`write_activations` of x in all that any of `forms` wants, permuted."""
    wanted = Formats(*map(max, zip(*forms, strict=True)))
    permuted = wanted.fp16 or wanted.rounded
    return write_activations(
        x, norm=norm, gated=gated, limit=limit, beside=beside, permuted=permuted, **wanted._asdict()
    )
