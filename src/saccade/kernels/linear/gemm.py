"""Products of many tokens, y = x @ w.T: weights are decoded in registers.

The weights are the left operand of the tensor cores (y.T = w @ x.T). Only the left operand may come from registers, and
there FP8 codes become FP16 exactly. activations.py splits the input before. Sums are fp32; the scale of a block of 128
x 128 codes multiplies sums over 64 of its columns. What is in 22 bits takes two passes over it, what is rounded to BF16
one; FP8 codes are fp8_gemm.py's. Where there are fewer programs than multiprocessors, columns are
split among several, and another launch adds the parts in their order: 128 tokens times qkv_a would have 34 programs.

Reference: `linear` in reference.py, which also computes what no kernel here reads. Serves more than 64 tokens, and any
number in tests; weights in FP8 by 128 x 128, or BF16 (by the library). Measured: o_proj of 4,096 tokens takes 390 us.
Next: moe/grouped_gemm.py, the same over experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import Activations, Formats, Split, dot_permuted
from saccade.kernels.launch import tiled
from saccade.kernels.linear.fp8_gemm import multiply_codes
from saccade.kernels.linear.split_k import divide_tiles, find_format
from saccade.kernels.types import Matrix


class GemmConfig(NamedTuple):
    """How a product is divided. More than 32 x 64 sums a warp spill registers: each warp has two sets of them, one of
    them for the columns of a step."""

    rows: int = 128  # of weights
    tokens: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 3
    parts: int | None = None  # of the columns; None: as many as give every multiprocessor work


GEMM = GemmConfig()
BUSY = 132  # programs from which columns are not split
PROGRAMS = 264  # to aim at where they are
LEAST_STEPS = 4  # of a part
SUM_COLUMNS = 1024  # that a program adds the parts of
# Of a thread: three programs of 4 warps share a multiprocessor. With a residual there were 183: o_proj of 4,096
# tokens took 424 us, not 390.
REGISTERS = 168


@triton.jit(do_not_specialize=["T"])
def _multiply_blocks(
    x, unit, codes, scale, residual, y, T, N, scale_stride, K: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y [T, N] = x [T, K] * unit @ (codes * scale) [N, K].T + residual [T, N]; x: T rows of high, if LOW then
    T of low. With parts of SPAN columns y is [parts, T, N], and not yet multiplied by `unit`."""
    blocks = tl.cdiv(N, BM)
    block = tl.program_id(0) % blocks  # rows of weights fastest: a tile of tokens is read once, all weights stay in L2
    first = tl.program_id(0) // blocks * BN
    row = block * BM + tl.arange(0, BM)
    token = first + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)  # where the tokens end, x goes on with others' low numbers: not stored
    scale_at = scale + block * BM // 128 * scale_stride
    begin = 0 if SPAN >= K else tl.program_id(1) * SPAN
    factor = tl.load(scale_at + begin // 128)  # a step ahead
    for step in range(0, SPAN, BK):
        start = begin + step
        weights = codes.load([block * BM, start]).to(tl.float16)
        part = dot_permuted(weights, x.load([first, start]).T, tl.zeros([BM, BN], tl.float32))
        if LOW:
            part = dot_permuted(weights, x.load([T + first, start]).T, part)
        following = tl.load(scale_at + tl.minimum(start + BK, K - 1) // 128)
        total += part * factor
        factor = following
    total = tl.trans(total)
    if SPAN >= K:
        total *= tl.load(unit + token, mask=token < T, other=0.0)[:, None]
    else:
        y += tl.program_id(1).to(tl.int64) * T * N
    at, inside = token.to(tl.int64)[:, None] * N + row[None, :], (token[:, None] < T) & (row[None, :] < N)
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(y + at, total, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _add_parts(
    parts, unit, residual, y, T, N, PARTS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [T, N] = the sum of `parts` [PARTS, T, N], in order, * unit + residual."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = token * N + column, column < N
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts + i * T.to(tl.int64) * N + at, mask=inside, other=0.0)
    total *= tl.load(unit + token)
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(y + at, total, mask=inside)


def multiply_blocks(x: Split, w: Matrix, residual: Tensor | None = None, tile: GemmConfig | None = None) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T + residual, for FP8 codes with f32 scales of 128 x 128; x in FP16, permuted,
    one number or two."""
    assert w.scale is not None
    assert len(x.unit) == x.numbers.shape[1], "expected activations without room for more rows"
    assert residual is None or residual.is_contiguous()
    t = tile or GEMM
    assert 128 % t.rows == 0 and 128 % t.columns == 0, f"{t}: a block of weights has one scale"
    (numbers, tokens, k), n = x.numbers.shape, w.data.shape[0]
    y = torch.empty(tokens, n, dtype=torch.float32, device=x.numbers.device)
    rest = y if residual is None else residual
    programs, steps = triton.cdiv(n, t.rows) * triton.cdiv(tokens, t.tokens), triton.cdiv(k, t.columns)
    wanted = t.parts or (1 if programs >= BUSY else max(PROGRAMS // max(programs, 1), 1))
    parts = 1 if wanted == 1 else divide_tiles(steps, wanted, 1 if t.parts else LEAST_STEPS)
    sums = y if parts == 1 else y.new_empty(parts, tokens, n)
    taken, codes = tiled(x.numbers.view(-1, k), t.tokens, t.columns), tiled(w.data, t.rows, t.columns)
    _multiply_blocks[(programs, parts)](
        taken, x.unit, codes, w.scale, rest, sums, tokens, n, w.scale.stride(0), K=k,
        SPAN=k if parts == 1 else steps // parts * t.columns, BM=t.rows, BN=t.tokens, BK=t.columns,
        LOW=numbers > 1, RESIDUAL=residual is not None and parts == 1, num_warps=t.warps, num_stages=t.stages,
        maxnreg=REGISTERS,
    )  # fmt: skip
    if parts > 1:
        _add_parts[(tokens, triton.cdiv(n, SUM_COLUMNS))](
            sums, x.unit, rest, y, tokens, n, PARTS=parts, RESIDUAL=residual is not None, BLOCK=SUM_COLUMNS, num_warps=4
        )
    return y


def multiply_bf16(x: Split, w: Tensor, activations: str) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T for BF16 weights, by the library. High and low numbers are rows of one
    product: two took 16 us with their sum, for 128 tokens and few columns, where a launch is what takes time."""
    if activations != "exact":
        return _product(x.high, w)
    high, low = _product(x.numbers.flatten(0, 1), w).chunk(2)
    return high.add_(low)


def _product(x: Tensor, w: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.float() @ w.float().t()
    return torch.mm(x, w.t(), out_dtype=torch.float32)


def find_formats(w: Matrix, activations: str = "exact") -> Formats:
    """The formats of activations in which `run_gemm` takes the input of w."""
    stored = find_format(w)
    if stored is None:
        return Formats(fp32=True)
    if stored == "bf16":
        return Formats(bf16=1 + (activations == "exact"))
    return Formats(fp16=activations == "exact", rounded=activations == "bf16", fp8=activations == "fp8")


def run_gemm(x: Activations, w: Matrix, activations: str = "exact", residual: Tensor | None = None) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T, plus `residual` (contiguous), for many tokens; x in the formats that w asks
    for. "exact" inputs keep 22 bits beside FP8 codes in blocks, 16 beside BF16 weights."""
    stored = find_format(w)
    if stored == "fp16":
        if activations == "fp8":
            return multiply_codes(x.fp8, w, residual)
        return multiply_blocks(x.fp16 if activations == "exact" else x.rounded, w, residual)
    if stored == "bf16":
        y = multiply_bf16(x.bf16, w.data, activations)
    else:
        y = reference.linear(x.fp32, w, torch.float32, activations)
    return y if residual is None else y.add_(residual)
