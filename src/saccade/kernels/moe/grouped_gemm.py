"""The experts' MLP of many tokens: pairs of token and expert, sorted by expert, multiplied tile by tile.

The first product is gate and up, with silu(gate) * up behind it. The second is down, with the routing weight. A last
pass adds the experts of a token in the order of the choice, so that equal inputs give equal bits. As in linear/gemm.py
the weights are the left operand, and are decoded in registers (formats.py).

Reference: `expert_mlp` in reference.py, which also computes what no kernel here reads. Serves any number of tokens;
BF16 and all encodings of formats.py. Next: pairs.py, how they are sorted; few_pairs.py, FP8 weights where an expert has
few pairs; fp8_experts.py, inputs in FP8.
"""

from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import Activations, Formats, Split, clamp_gate, dot, dot_permuted, write_activations
from saccade.kernels.formats import (
    END,
    NUMBER,
    SUM,
    Format,
    load_group_scales,
    read_format,
    read_nibbles,
    read_second,
    spread,
)
from saccade.kernels.launch import can_be_tiled, tiled
from saccade.kernels.linear.gemm import GEMM, GemmConfig
from saccade.kernels.moe.few_pairs import add_few_pairs, has_few_pairs
from saccade.kernels.moe.fp8_experts import add_fp8_experts, is_fp8_served
from saccade.kernels.moe.pairs import SortedPairs, add_pairs, arrange
from saccade.kernels.types import Matrix

LEAST_PAIRS = 16  # of a tile
# Of gate and up, and of down, where tiles have so many: a step of up to 512 tokens over 256 experts. On an H200 64
# columns of gate and up took 460 us for 64 tokens, 128 columns 387 in three stages, 372 in four.
GATE_FEW, DOWN_FEW = GEMM._replace(columns=128, stages=4), GEMM


@triton.jit
def read_columns(x, at, column, left, K: tl.constexpr, BK: tl.constexpr, GATHERED: tl.constexpr, EVEN: tl.constexpr):
    """[BK, BN]: columns of x [rows, K] from `column` on, of the rows `at` [BN] if GATHERED, else of its tile of rows
    from `at` on."""
    if GATHERED:
        k = tl.arange(0, BK)[:, None]
        place = x + at.to(tl.int64)[None, :] * K + (column + k)
        return tl.load(place) if EVEN else tl.load(place, mask=k < left, other=0.0)
    else:
        return x.load([at, column]).T


@triton.jit
def add_product(
    numbers, x, span, at, column, left, total, K: tl.constexpr, LOW: tl.constexpr, GATHERED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """total + numbers @ rows `at` of x, if LOW also of the low halves behind `span` rows: columns from `column` on, of
    which `left` are left."""
    BK: tl.constexpr = numbers.shape[1]
    # Behind the even columns of x lie the odd ones, and a code of 0 may be a number.
    if not EVEN:
        numbers = tl.where(tl.arange(0, BK)[None, :] < left, numbers, 0.0)
    high = read_columns(x, at, column, left, K, BK, GATHERED, EVEN)
    if numbers.dtype == tl.float16:
        total = dot_permuted(numbers, high, total)
    if numbers.dtype != tl.float16:
        total = dot(numbers, high, total)
    if LOW:
        total = dot_permuted(numbers, read_columns(x, span + at, column, left, K, BK, GATHERED, EVEN), total)
    return total


@triton.jit
def multiply_tile(
    x, span, at, codes, matrix, first, scale, second, expert, row, K: tl.constexpr, scale_stride, scale_rows,
    FP16: tl.constexpr, LOW: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DIVIDES: tl.constexpr,
    GATHERED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: rows `row` [BM] of an expert's weights, which the tile of `codes` at [matrix, first] holds, times
    rows `at` of x."""
    PACKED: tl.constexpr = CODE == "e2m1" or CODE == "int4" or CODE == "uint4"
    STORED: tl.constexpr = K // 2 if PACKED else K
    STEP: tl.constexpr = BK // 2 if PACKED else BK
    EACH: tl.constexpr = WIDTH // 2 if PACKED else WIDTH  # stored columns of a group
    EVEN: tl.constexpr = STORED % STEP == 0
    dtype: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    scale_at = scale + (expert.to(tl.int64) * scale_rows + row // ROWS) * scale_stride
    total = tl.zeros([BM, BN], tl.float32)
    if WHERE == SUM:  # a step ahead
        factor = load_group_scales(scale_at, row >= 0, EXPONENT)
    for start in range(0, STORED, STEP):
        found = tl.reshape(codes.load([matrix, first, start]), [BM, STEP])
        part = total
        if WHERE == SUM or FP16:  # tensor cores lose some 4e-9 of a sum a column: 2.7e-7 in 64, 4.6e-7 in 128
            part = tl.zeros([BM, BN], tl.float32)
        if WHERE == NUMBER:
            group = start // EACH + tl.arange(0, STEP // EACH)
            inside = (group[None, :] < tl.cdiv(STORED, EACH)) & (row[:, None] >= 0)
            factors = spread(load_group_scales(scale_at[:, None] + group[None, :], inside, EXPONENT), EACH)
        if PACKED:
            even, odd = read_nibbles(found & 15, CODE, dtype), read_nibbles(found >> 4, CODE, dtype)
            if WHERE == NUMBER:
                even = (even * factors).to(dtype)
                odd = (odd * factors).to(dtype)
            part = add_product(even, x, span, at, start, STORED - start, part, K, LOW, GATHERED, EVEN)
            part = add_product(odd, x, span, at, STORED + start, STORED - start, part, K, LOW, GATHERED, EVEN)
        else:
            numbers = found.to(dtype)
            if WHERE == NUMBER:
                numbers = (numbers * factors).to(dtype)
            part = add_product(numbers, x, span, at, start, STORED - start, part, K, LOW, GATHERED, EVEN)
        if WHERE == SUM:
            following = load_group_scales(scale_at + tl.minimum(start + STEP, STORED - 1) // EACH, row >= 0, EXPONENT)
            total += part * factor[:, None]
            factor = following
        elif FP16:
            total += part
        else:
            total = part
    if WHERE == END:
        total *= load_group_scales(scale_at, row >= 0, EXPONENT)[:, None]
    if RUN > 0:
        factor = read_second(second, expert, row, RUNS, RUN)[:, None]
        total = total / factor if DIVIDES else total * factor
    return total


@triton.jit(do_not_specialize=["span"])
def multiply_experts(
    x, unit, codes, scale, second, order, tile_expert, tile_first, tile_end, weights, y, span, N, scale_stride,
    scale_rows, TOPK: tl.constexpr, GATE: tl.constexpr, FP16: tl.constexpr, LOW: tl.constexpr,
    K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    EXPONENT: tl.constexpr, RUN: tl.constexpr,
    RUNS: tl.constexpr, DIVIDES: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """GATE: y [pairs in order, N / 2] of tokens x. Else y [T * TOPK, N] of pairs in order, weighted. x: `span` rows of
    high, if LOW then as many of low. unit: of a row of x. codes: gate and up of each expert, or down, a matrix each; a
    tile of GATE is as many rows of gate as of up."""
    HALVES: tl.constexpr = 2 if GATE else 1  # of an expert's rows: gate and up
    OUT: tl.constexpr = BM // HALVES
    width = N // HALVES
    blocks = tl.cdiv(width, OUT)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    expert = tl.load(tile_expert + tile)
    first = tl.load(tile_first + tile)
    end = tl.load(tile_end + tile)
    if first < end:
        place = first + tl.arange(0, BN)
        here = place < end
        pair = tl.load(order + place, mask=here, other=0)
        source = pair // TOPK if GATE else tl.where(here, place, 0)
        r = tl.arange(0, BM)
        row = tl.minimum(block * OUT + r % OUT, width - 1) + r // OUT * width  # for scales; codes behind the end are 0
        total = multiply_tile(
            x, span, source if GATE else first, codes, expert * HALVES, block * OUT, scale, second,
            expert, row, K, scale_stride, scale_rows, FP16, LOW, CODE, WHERE, ROWS, WIDTH, EXPONENT, RUN, RUNS,
            DIVIDES, GATE, BM, BN, BK,
        )  # fmt: skip
        if FP16:
            total *= tl.load(unit + source)[None, :]
        if GATE:
            gate, up = tl.split(tl.permute(tl.reshape(total, [2, OUT, BN]), (1, 2, 0)))
            gate, up = clamp_gate(gate, up, LIMIT)
            total = gate / (1 + tl.exp(-gate)) * up
            target = place
        else:
            total *= tl.load(weights + pair, mask=here, other=0.0)[None, :]
            target = pair
        column = block * OUT + tl.arange(0, OUT)
        at = y + target.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(at, tl.trans(total), mask=here[:, None] & (column[None, :] < width))


def _read(gate_up: Matrix, down: Matrix) -> tuple[Format, Format] | None:
    """None for what the kernels here do not read."""
    first, last = read_format(gate_up), read_format(down)
    if first is None or last is None or not (can_be_tiled(first.codes) and can_be_tiled(last.codes)):
        return None
    return first, last


def find_expert_formats(gate_up: Matrix, down: Matrix, activations: str = "exact") -> Formats:
    """The formats of activations in which `add_experts` takes the input of these experts."""
    if is_in_fp8(gate_up, down, activations):
        return Formats(fp8=True) if is_fp8_served(gate_up, down) else Formats(fp32=True)
    stored = _read(gate_up, down)
    if stored is None or stored[0].is_packed:  # columns of packed numbers lie apart: written once more
        return Formats(fp32=True)
    return _find_format(stored[0], activations)


def is_in_fp8(gate_up: Matrix, down: Matrix, activations: str) -> bool:
    """Whether inputs are rounded to FP8 beside any of them."""
    return activations == "fp8" and any(map(reference.is_fp8_blocks, (gate_up, down)))


def _find_format(stored: Format, activations: str) -> Formats:
    if not stored.is_fp16:
        return Formats(bf16=1)
    return Formats(fp16=True) if activations == "exact" else Formats(rounded=True)


def _take(x: Activations, form: Formats) -> Split:
    """What `form` asked for."""
    return x.fp16 if form.fp16 else x.rounded if form.rounded else x.bf16


def add_experts(
    x: Activations | Tensor, base: Tensor | None, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix,
    tiles: tuple[GemmConfig, GemmConfig] | None = None, limit: float = inf, activations: str = "exact",
) -> Tensor:  # fmt: skip
    """f32 [T, hidden] = base + the sum over a token's experts [T, topk] of weight * mlp(x); x as `find_expert_formats`
    says, or f32 [T, hidden]; limit: of `silu_and_mul`."""
    stored, numbers = _read(gate_up, down), x.fp32 if isinstance(x, Activations) else x
    is_fp8 = is_in_fp8(gate_up, down, activations)
    if is_fp8 and is_fp8_served(gate_up, down):
        codes = x.fp8 if isinstance(x, Activations) else write_activations(x, fp8=True).fp8
        return add_fp8_experts(codes, base, experts, weights, gate_up, down, limit)
    if is_fp8 or stored is None:
        mixture = reference.expert_mlp(numbers, experts.long(), weights, gate_up, down, limit, activations)
        return mixture if base is None else base + mixture
    forms = [_find_format(s, activations) for s in stored]
    if isinstance(x, Activations) and not stored[0].is_packed:
        taken = _take(x, forms[0])
    else:
        taken = _write(numbers, stored[0], forms[0])
    if tiles is None and forms[0].fp16 and has_few_pairs(experts.numel(), gate_up, down):
        return add_few_pairs(taken, base, experts, weights, gate_up, down, limit)
    return _run(taken, *stored, forms[1], experts.contiguous(), weights, base, tiles, limit)


def expert_mlp(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix,
    tiles: tuple[GemmConfig, GemmConfig] | None = None, limit: float = inf, activations: str = "exact",
) -> Tensor:  # fmt: skip
    """[T, hidden]: the sum over a token's experts of weight * mlp(x), always in the order of `experts` [T, topk].

    tiles: of gate and up, whose rows count both, and of down, which takes as many tokens.
    """
    if experts.numel() == 0:
        return reference.expert_mlp(x, experts, weights, gate_up, down, limit, activations)
    return add_experts(x, None, experts, weights, gate_up, down, tiles, limit, activations).to(x.dtype)


def _run(
    x: Split, first: Format, last: Format, form: Formats, experts: Tensor, weights: Tensor, base: Tensor | None,
    tiles: tuple[GemmConfig, GemmConfig] | None, limit: float,
) -> Tensor:  # fmt: skip
    n_experts, rows, _ = first.codes.shape
    (tokens, topk), width = experts.shape, last.codes.shape[1]
    # A tile takes as many tokens as an expert has on average.
    most = tiles[0].tokens if tiles else GEMM.tokens
    size = max(LEAST_PAIRS, min(most, triton.next_power_of_2(-(-tokens * topk // n_experts))))
    gate_tile, down_tile = tiles or ((GATE_FEW, DOWN_FEW) if size == LEAST_PAIRS else (GEMM, GEMM))
    pairs_of = arrange(experts, n_experts, size)
    hidden = torch.empty(tokens * topk, rows // 2, dtype=torch.float32, device=x.numbers.device)
    _launch(x, first, pairs_of, weights, hidden, topk, True, gate_tile, limit)
    pairs = hidden.new_empty(tokens * topk, width)
    _launch(_write(hidden, last, form), last, pairs_of, weights, pairs, topk, False, down_tile, inf)
    return add_pairs(pairs, experts, base)


def _write(x: Tensor, w: Format, form: Formats) -> Split:
    permuted = form.fp16 or form.rounded
    return _take(write_activations(x, apart=1 + w.is_packed, permuted=permuted, **form._asdict()), form)


def _launch(
    x: Split, w: Format, tiles: SortedPairs, weights: Tensor, y: Tensor, topk: int, gate: bool, tile: GemmConfig,
    limit: float,
) -> None:  # fmt: skip
    n_experts, rows, stored = w.codes.shape
    assert 128 % tile.columns == 0, f"{tile}: columns of a step have one scale"
    halves, step = 1 + gate, tile.columns * stored // w.columns
    codes = tiled(w.codes.view(n_experts * halves, rows // halves, stored), halves, tile.rows // halves, step)
    taken = x.numbers.view(-1, w.columns)
    multiply_experts[(tiles.expert.shape[0] * triton.cdiv(rows, tile.rows),)](
        taken if gate else tiled(taken, tiles.size, step), x.unit, codes, w.scale, w.second, tiles.order, tiles.expert,
        tiles.first, tiles.end, weights.contiguous(), y, x.numbers.shape[1], rows,
        w.scale.stride(1) if w.scale.numel() else 0, w.scale.shape[1] if w.scale.numel() else 0, TOPK=topk, GATE=gate,
        FP16=w.is_fp16, LOW=x.numbers.shape[0] > 1, K=w.columns, **w.form,
        LIMIT=limit, RUNS=w.second.shape[1] if w.second.numel() else 1, BM=tile.rows, BN=tiles.size, BK=tile.columns,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
