"""The experts' MLP of many tokens, inputs and weights in FP8: pairs of token and expert, sorted, tile by tile.

As in linear/fp8_gemm.py a sum runs over the 128 columns of one scale, and the tokens are the left operand: a thread
holds sums of two pairs, and loads their two scales a step. With the weights on the left it loaded 16. A tile of the
first product holds rows of gate and as many of up. A program of the second goes through several tiles of rows: with
256 columns each has two steps. What it writes for each pair are BF16 numbers, 470 MB for 4,096 tokens of DeepSeek-V3.2.
They move the result by 2e-3, the FP8 inputs by 5e-2.

Reference: `expert_mlp` in reference.py with activations "fp8". Serves any number of tokens; experts in FP8 by 128 x
128, with an inner width that is a multiple of 64. Measured: 4,096 tokens took 1,643 us in the kernels of
grouped_gemm.py. Next: grouped_gemm.py, all other experts.
"""

from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import Codes, clamp_gate, dot, write_activations
from saccade.kernels.launch import can_be_tiled, tiled
from saccade.kernels.moe.pairs import SortedPairs, add_pairs, arrange
from saccade.kernels.types import SCALE_BLOCK, Matrix


class Fp8Config(NamedTuple):
    """How a product is divided. A step is the 128 columns of a scale."""

    pairs: int = 64  # of a tile
    rows: int = 64  # of weights; of gate, and as many of up
    each: int = 1  # tiles of rows that a program goes through
    warps: int = 4
    stages: int = 4


# Of 4,096 tokens, gate and up with 128 pairs a tile: 1,408 us in all, not 1,102. Tiles fill worse.
GATE_UP, DOWN = Fp8Config(), Fp8Config(rows=128, each=4, stages=3)
ROWS = 64  # an inner width is a multiple of it: a tile of rows has one scale


@triton.jit
def _store_tile(total, weights, pair, place, here, y, row, width, GATE: tl.constexpr, LIMIT: tl.constexpr):
    """silu(gate) * up of sums [BM, 2 * BN], by place; or sums [BM, BN], weighted, by pair."""
    if GATE:
        BM: tl.constexpr = total.shape[0]
        BN: tl.constexpr = total.shape[1] // 2
        gate, up = tl.split(tl.permute(tl.reshape(total, [BM, 2, BN]), (0, 2, 1)))
        gate, up = clamp_gate(gate, up, LIMIT)
        value = gate / (1 + tl.exp(-gate)) * up
        target = place
    else:
        value = total * tl.load(weights + pair, mask=here, other=0.0)[:, None]
        target = pair
    column = row + tl.arange(0, value.shape[1])
    at = y + target.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=here[:, None] & (column[None, :] < width))


@triton.jit
def _multiply_pairs(
    x, x_scale, codes, scale, order, tile_expert, tile_first, tile_end, weights, y, N, scale_stride, scale_rows,
    K: tl.constexpr, TOPK: tl.constexpr, GATE: tl.constexpr, LIMIT: tl.constexpr, EACH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """GATE: y [pairs in order, N / 2] of tokens x [T, K]. Else y [T * TOPK, N] of pairs in order, weighted. codes: gate
    and up of each expert, or down, a matrix each."""
    HALVES: tl.constexpr = 2 if GATE else 1
    WIDE: tl.constexpr = HALVES * BN
    STEPS: tl.constexpr = (K + BK - 1) // BK
    width = N // HALVES
    programs = tl.cdiv(width, EACH * BN)
    tile, begin = tl.program_id(0) // programs, tl.program_id(0) % programs * (EACH * BN)
    expert, first, end = tl.load(tile_expert + tile), tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first < end:
        place = first + tl.arange(0, BM)
        here = place < end
        pair = tl.load(order + place, mask=here, other=0)
        source = pair // TOPK if GATE else tl.where(here, place, first)
        factors, column = x_scale + source.to(tl.int64) * STEPS, tl.arange(0, BK)[None, :]
        x_at = x + source.to(tl.int64)[:, None] * K + column if GATE else x
        scale_at = scale + expert.to(tl.int64) * scale_rows * scale_stride
        is_gate = tl.arange(0, WIDE) < BN
        own, factor = tl.load(factors), tl.load(scale_at + begin // 128 * scale_stride)  # a step ahead
        second = tl.load(scale_at + (width + begin) // 128 * scale_stride) if GATE else factor
        total = tl.zeros([BM, WIDE], tl.float32)
        for i in range(EACH * STEPS):
            step, row = i % STEPS, begin + i // STEPS * BN
            if GATE:
                inside = here[:, None] if K % BK == 0 else here[:, None] & (column < K - step * BK)
                left = tl.load(x_at + step * BK, mask=inside, other=0.0)
            else:
                left = x.load([first, step * BK])
            right = tl.reshape(codes.load([expert * HALVES, row, step * BK]), [WIDE, BK])
            part = dot(left, right.T, tl.zeros([BM, WIDE], tl.float32))
            ahead = tl.minimum(i + 1, EACH * STEPS - 1)
            following = tl.minimum(begin + ahead // STEPS * BN, width - 1)
            next_own = tl.load(factors + ahead % STEPS)
            next_factor = tl.load(scale_at + following // 128 * scale_stride + ahead % STEPS)
            if GATE:
                total += part * own[:, None] * tl.where(is_gate, factor, second)[None, :]
                second = tl.load(scale_at + (width + following) // 128 * scale_stride + ahead % STEPS)
            else:
                total += part * (own * factor)[:, None]
            own, factor = next_own, next_factor
            if EACH > 1 and step == STEPS - 1:
                _store_tile(total, weights, pair, place, here, y, row, width, GATE, LIMIT)
                total = tl.zeros([BM, WIDE], tl.float32)
        if EACH == 1:
            _store_tile(total, weights, pair, place, here, y, begin, width, GATE, LIMIT)


def is_fp8_served(gate_up: Matrix, down: Matrix) -> bool:
    """Whether `add_fp8_experts` takes these experts."""
    if not (reference.is_fp8_blocks(gate_up) and reference.is_fp8_blocks(down)):
        return False
    return down.data.shape[2] % ROWS == 0 and can_be_tiled(gate_up.data) and can_be_tiled(down.data)


def add_fp8_experts(
    x: Codes, base: Tensor | None, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, limit: float = inf,
    how: tuple[Fp8Config, Fp8Config] = (GATE_UP, DOWN),
) -> Tensor:  # fmt: skip
    """f32 [T, hidden] = base + the sum over a token's experts [T, topk] of weight * mlp(x); -1 is none of these.
    limit: of `silu_and_mul`."""
    experts, device = experts.contiguous(), experts.device
    pairs_of = arrange(experts, len(gate_up.data), how[0].pairs)
    inner = torch.empty(experts.numel(), down.data.shape[2], dtype=torch.float32, device=device)
    _launch(x, gate_up, pairs_of, weights, inner, True, limit, how[0])
    pairs = torch.empty(experts.numel(), down.data.shape[1], dtype=torch.bfloat16, device=device)
    _launch(write_activations(inner, fp8=True).fp8, down, pairs_of, weights, pairs, False, inf, how[1])
    return add_pairs(pairs, experts, base)


def _launch(
    x: Codes, w: Matrix, tiles: SortedPairs, weights: Tensor, y: Tensor, gate: bool, limit: float, how: Fp8Config
) -> None:
    (n_experts, rows, k), halves = w.data.shape, 1 + gate
    assert w.scale is not None and SCALE_BLOCK % how.rows == 0, f"{how}: a tile of rows has one scale"
    codes = tiled(w.data.view(n_experts * halves, rows // halves, k), halves, how.rows, SCALE_BLOCK)
    taken = x.numbers if gate else tiled(x.numbers, tiles.size, SCALE_BLOCK)
    _multiply_pairs[(len(tiles.expert) * triton.cdiv(rows // halves, how.rows * how.each),)](
        taken, x.scales, codes, w.scale, tiles.order, tiles.expert, tiles.first, tiles.end, weights.contiguous(), y,
        rows, w.scale.stride(1), w.scale.shape[1], K=k, TOPK=weights.shape[1], GATE=gate, LIMIT=limit, EACH=how.each,
        BM=tiles.size, BN=how.rows, BK=SCALE_BLOCK, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
