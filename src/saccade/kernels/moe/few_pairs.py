"""The experts' MLP of some tens of tokens, weights in FP8: pairs of token and expert, sorted, eight a tile.

Most experts then have one to eight pairs, and the bytes of their weights are the limit. The weights are the left
operand of the tensor cores, decoded in registers. A product has 16 columns at least: the high numbers of eight pairs
and their low ones. So a step is one product, where grouped_gemm.py needs two for 16 pairs. A program of down goes
through several tiles of rows: with 256 columns each has two steps.

Reference: `expert_mlp` in reference.py. Serves experts in FP8 by 128 x 128 whose inner width is a multiple of 64;
inputs in 22 bits. Measured: 32, 64 and 128 tokens take 235, 326 and 367 us, in grouped_gemm.py 282, 366 and 413.
Next: pairs.py; grouped_gemm.py, which takes what this does not.
"""

from math import inf
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import Split, clamp_gate, dot_permuted, write_activations
from saccade.kernels.launch import begin, can_be_tiled, tiled, uses_pdl, wait
from saccade.kernels.moe.fp8_experts import ROWS
from saccade.kernels.moe.pairs import SortedPairs, add_pairs, arrange
from saccade.kernels.types import SCALE_BLOCK, Matrix, Mlp


class FewConfig(NamedTuple):
    """How a product is divided. A step is the 128 columns of a scale."""

    rows: int = 64  # of weights; of gate, and as many of up
    each: int = 1  # tiles of rows that a program goes through
    warps: int = 4
    stages: int = 4


FEW_GATE_UP, FEW_DOWN = FewConfig(), FewConfig(rows=128, each=4)
FEW_PAIRS = 8  # of a tile
MEAN_PAIRS = 4  # of an expert at most: 128 tokens that choose 8 of 256


@triton.jit
def _store_pairs(
    total, units, weights, pair, target, here, y, row, width, GATE: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Into rows `target` [BN]: silu(gate) * up of sums [2 * BM, 2 * BN]; or sums [BM, 2 * BN], times weights of pairs
    if WEIGHTED."""
    BN: tl.constexpr = total.shape[1] // 2
    value = tl.sum(tl.reshape(total, [total.shape[0], 2, BN]), 1) * units[None, :]  # high + low
    if GATE:
        BM: tl.constexpr = total.shape[0] // 2
        gate, up = tl.split(tl.permute(tl.reshape(value, [2, BM, BN]), (1, 2, 0)))
        gate, up = clamp_gate(gate, up, LIMIT)
        value = gate / (1 + tl.exp(-gate)) * up
    if WEIGHTED:
        value *= tl.load(weights + pair, mask=here, other=0.0)[None, :]
    column = row + tl.arange(0, value.shape[0])
    at = y + target.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, tl.trans(value), mask=here[:, None] & (column[None, :] < width))


@triton.jit
def _run_tiles(
    x_at, codes, matrix, scale_at, units, weights, pair, target, here, y, start, width, scale_stride, K: tl.constexpr,
    GATE: tl.constexpr, LIMIT: tl.constexpr, WEIGHTED: tl.constexpr, EACH: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """EACH tiles of rows, from `start` on, of one expert's matrix, times the columns x_at [BK, 2 * BN] and on."""
    HALVES: tl.constexpr = 2 if GATE else 1
    TALL: tl.constexpr = HALVES * BM
    STEPS: tl.constexpr = (K + BK - 1) // BK
    COLUMNS: tl.constexpr = x_at.shape[1]
    k, is_gate = tl.arange(0, BK)[:, None], tl.arange(0, TALL) < BM
    factor = tl.load(scale_at + start // 128 * scale_stride)  # a step ahead
    second = tl.load(scale_at + (width + start) // 128 * scale_stride) if GATE else factor
    total = tl.zeros([TALL, COLUMNS], tl.float32)
    for i in range(EACH * STEPS):
        step, row = i % STEPS, start + i // STEPS * BM
        left = tl.reshape(codes.load([matrix, row, step * BK]), [TALL, BK])
        if K % BK == 0:
            right = tl.load(x_at + step * BK)
        else:
            right = tl.load(x_at + step * BK, mask=k < K - step * BK, other=0.0)
        part = dot_permuted(left.to(tl.float16), right, tl.zeros([TALL, COLUMNS], tl.float32))
        ahead = tl.minimum(i + 1, EACH * STEPS - 1)
        following = tl.minimum(start + ahead // STEPS * BM, width - 1)
        next_factor = tl.load(scale_at + following // 128 * scale_stride + ahead % STEPS)
        if GATE:
            total += part * tl.where(is_gate, factor, second)[:, None]
            second = tl.load(scale_at + (width + following) // 128 * scale_stride + ahead % STEPS)
        else:
            total += part * factor
        factor = next_factor
        if EACH > 1 and step == STEPS - 1:
            _store_pairs(total, units, weights, pair, target, here, y, row, width, GATE, LIMIT, WEIGHTED)
            total = tl.zeros([TALL, COLUMNS], tl.float32)
    if EACH == 1:
        _store_pairs(total, units, weights, pair, target, here, y, start, width, GATE, LIMIT, WEIGHTED)


@triton.jit(do_not_specialize=["span", "tokens", "shared_tiles"])
def _multiply_few(
    x, unit, codes, scale, shared_codes, shared_scale, order, tile_expert, tile_first, tile_end, weights, y, span,
    tokens, shared_tiles, N, scale_stride, scale_rows, K: tl.constexpr, TOPK: tl.constexpr, GATE: tl.constexpr,
    LIMIT: tl.constexpr, SHARED: tl.constexpr, SHARED_LIMIT: tl.constexpr, EACH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GATE: y [pairs in order, N / 2] of tokens x. Else y [T * TOPK, N] of pairs in order, weighted. x: `span` rows of
    high numbers, then as many of low ones, permuted. codes: gate and up of each expert, or down, a matrix each. With
    SHARED the first tiles are of the shared expert: its rows lie behind those of all pairs, in x and in y."""
    begin(PDL)
    wait(PDL)
    HALVES: tl.constexpr = 2 if GATE else 1
    width = N // HALVES
    programs = tl.cdiv(width, EACH * BM)
    tile, start = tl.program_id(0) // programs, tl.program_id(0) % programs * (EACH * BM)
    k = tl.arange(0, BK)[:, None]
    both = tl.arange(0, 2 * BN)  # a product's columns: high numbers, then low ones
    pairs = tokens * TOPK
    if SHARED and tile < shared_tiles:
        place = tile * BN + tl.arange(0, BN)
        here = place < tokens
        source = tl.minimum(tile * BN + both % BN, tokens - 1)
        if not GATE:
            source += pairs
        units = tl.load(unit + (place if GATE else place + pairs), mask=here, other=0.0)
        x_at = x + (source + both // BN * span).to(tl.int64)[None, :] * K + k
        _run_tiles(
            x_at, shared_codes, 0, shared_scale, units, unit, place, place + pairs, here, y, start, width, scale_stride,
            K, GATE, SHARED_LIMIT, False, EACH, BM, BK,
        )  # fmt: skip
    else:
        tile -= shared_tiles
        expert, first, end = tl.load(tile_expert + tile), tl.load(tile_first + tile), tl.load(tile_end + tile)
        if first < end:
            place = first + tl.arange(0, BN)
            here = place < end
            pair = tl.load(order + place, mask=here, other=0)
            units = tl.load(unit + (pair // TOPK if GATE else place), mask=here, other=0.0)
            source = tl.minimum(first + both % BN, end - 1)
            if GATE:
                source = tl.load(order + source) // TOPK
            x_at = x + (source + both // BN * span).to(tl.int64)[None, :] * K + k
            scale_at = scale + expert.to(tl.int64) * scale_rows * scale_stride
            _run_tiles(
                x_at, codes, expert * HALVES, scale_at, units, weights, pair, place if GATE else pair, here, y, start,
                width, scale_stride, K, GATE, LIMIT, not GATE, EACH, BM, BK,
            )  # fmt: skip


def has_few_pairs(pairs: int, gate_up: Matrix, down: Matrix) -> bool:
    """Whether `add_few_pairs` takes these experts, and one has MEAN_PAIRS of the `pairs` or fewer: one in 50 then has
    more than a tile takes."""
    is_whole = down.data.shape[-1] % ROWS == 0
    return pairs <= MEAN_PAIRS * len(gate_up.data) and is_whole and all(map(_is_served, (gate_up, down)))


def can_be_beside(shared: Mlp, gate_up: Matrix, down: Matrix) -> bool:
    """Whether the shared expert is as large as the others, and stored as they are."""
    pairs = ((shared.gate_up, gate_up), (shared.down, down))
    return all(_is_served(own) and own.data.shape == others.data.shape[1:] for own, others in pairs)


def _is_served(w: Matrix) -> bool:
    return w.data.shape[-1] % 16 == 0 and reference.is_fp8_blocks(w) and can_be_tiled(w.data)


def add_few_pairs(
    x: Split, base: Tensor | None, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, limit: float = inf,
    shared: Mlp | None = None, how: tuple[FewConfig, FewConfig] = (FEW_GATE_UP, FEW_DOWN),
) -> Tensor:  # fmt: skip
    """f32 [T, hidden] = base + the sum over a token's experts [T, topk] of weight * mlp(x); -1 is none of these.
    x: two FP16 numbers of each, permuted; limit: of `silu_and_mul`. With `shared` also mlp(x) of that."""
    experts, (tokens, topk) = experts.contiguous(), experts.shape
    tiles = arrange(experts, len(gate_up.data), FEW_PAIRS)
    rows = tokens * (topk + (shared is not None))
    inner = x.unit.new_empty(rows, down.data.shape[2])
    beside = (shared.gate_up, shared.limit) if shared else None
    _launch(x, gate_up, beside, tiles, weights, inner, True, limit, how[0])
    found = x.unit.new_empty(rows, down.data.shape[1])
    written = write_activations(inner, fp16=True, permuted=True).fp16
    _launch(written, down, (shared.down, inf) if shared else None, tiles, weights, found, False, inf, how[1])
    return add_pairs(found, experts, base, shared is not None)


def _launch(
    x: Split, w: Matrix, shared: tuple[Matrix, float] | None, tiles: SortedPairs, weights: Tensor, y: Tensor,
    gate: bool, limit: float, how: FewConfig,
) -> None:  # fmt: skip
    (n_experts, rows, k), halves, pdl = w.data.shape, 1 + gate, uses_pdl(y)
    assert w.scale is not None and SCALE_BLOCK % how.rows == 0, f"{how}: a tile of rows has one scale"
    block = (halves, how.rows, SCALE_BLOCK)
    codes = tiled(w.data.view(n_experts * halves, rows // halves, k), *block)
    own, own_limit = shared or (Matrix(w.data[0], w.scale), inf)
    shared_tiles = triton.cdiv(len(weights), tiles.size) if shared else 0
    _multiply_few[((shared_tiles + len(tiles.expert)) * triton.cdiv(rows // halves, how.rows * how.each),)](
        x.numbers, x.unit, codes, w.scale, tiled(own.data.view(halves, rows // halves, k), *block), own.scale,
        tiles.order, tiles.expert, tiles.first, tiles.end, weights.contiguous(), y, x.numbers.shape[1], len(weights),
        shared_tiles, rows, w.scale.stride(1), w.scale.shape[1], K=k, TOPK=weights.shape[1], GATE=gate, LIMIT=limit,
        SHARED=shared is not None, SHARED_LIMIT=own_limit, EACH=how.each, BM=how.rows, BN=tiles.size, BK=SCALE_BLOCK,
        PDL=pdl, num_warps=how.warps, num_stages=how.stages, launch_pdl=pdl,
    )  # fmt: skip
