"""Pairs of a token and one of its experts: sorted by expert before their products, added up by token behind.

The host reads nothing back: there are tiles enough for any choice of experts, and tiles without pairs end at once.

Serves any number of pairs. Measured: 32,768 pairs of 256 experts took 84 us in torch's dozen of launches.
Next: grouped_gemm.py, fp8_experts.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait

SORTED_TOGETHER = 2048  # pairs that a program looks at together
ADDED_COLUMNS = 1024  # of a program that adds


class SortedPairs(NamedTuple):
    """Pairs in the order of their experts, and runs of at most `size` pairs of one expert."""

    order: Tensor  # i32 [pairs]: which pair, token * topk + i
    expert: Tensor  # i32 [tiles]
    first: Tensor  # i32 [tiles]: in `order`
    end: Tensor  # i32 [tiles]: of the expert's pairs, in `order`; not after `first` if the tile is unused
    size: int


@triton.jit(do_not_specialize=["pairs", "slots"])
def _arrange(
    ids, order, tile_expert, tile_first, tile_end, pairs, slots, EXPERTS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program an expert. Its tiles begin at the place (pairs before) // SIZE + (experts before), which is behind all
    tiles of those; what it leaves up to the next expert's place is unused."""
    begin(PDL)
    wait(PDL)
    expert, index = tl.program_id(0), tl.arange(0, BLOCK)
    before, own = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        found = tl.load(ids + first + index, mask=first + index < pairs, other=-1).to(tl.int32)
        before += ((found >= 0) & (found < expert)).to(tl.int32)
        own += (found == expert).to(tl.int32)
    start = tl.sum(before, 0)
    end = start + tl.sum(own, 0)
    done = start
    for first in range(0, pairs, BLOCK):
        found = tl.load(ids + first + index, mask=first + index < pairs, other=-1).to(tl.int32)
        mine = (found == expert).to(tl.int32)
        tl.store(order + done + tl.cumsum(mine, 0) - 1, first + index, mask=mine > 0)
        done += tl.sum(mine, 0)
    tile = start // SIZE + expert + tl.arange(0, TILES)
    is_own = tile < tl.where(expert == EXPERTS - 1, slots, end // SIZE + expert + 1)
    tl.store(tile_expert + tile, tl.zeros([TILES], tl.int32) + expert, mask=is_own)
    tl.store(tile_first + tile, start + tl.arange(0, TILES) * SIZE, mask=is_own)
    tl.store(tile_end + tile, tl.zeros([TILES], tl.int32) + end, mask=is_own)


def arrange(experts: Tensor, n_experts: int, size: int) -> SortedPairs:
    """experts: integers [T, topk]; -1 is none of these. Pairs of one expert stay in their order."""
    flat = experts.flatten()
    slots, pdl = flat.shape[0] // size + n_experts, uses_pdl(flat)
    order = torch.empty_like(flat, dtype=torch.int32)
    expert, first, end = torch.empty(3, slots, dtype=torch.int32, device=flat.device)
    block = min(SORTED_TOGETHER, triton.next_power_of_2(flat.shape[0]))
    _arrange[n_experts,](
        flat, order, expert, first, end, flat.shape[0], slots, EXPERTS=n_experts, SIZE=size, BLOCK=block,
        TILES=triton.next_power_of_2(flat.shape[0] // size + 2), PDL=pdl, num_warps=4 if block < SORTED_TOGETHER else 8,
        launch_pdl=pdl,
    )  # fmt: skip
    return SortedPairs(order, expert, first, end, size)


@triton.jit
def _add_pairs(
    pairs, ids, base, y, width, TOPK: tl.constexpr, SHARED: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [T, width] = base + the sum of TOPK rows of pairs [T * TOPK, width], in order; those of no expert are left
    out. If SHARED a row of each token lies behind them."""
    wait(PDL)
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if SHARED:
        row = tl.num_programs(0).to(tl.int64) * TOPK + token
        total += tl.load(pairs + row * width + column, mask=column < width, other=0.0)
    for i in tl.static_range(TOPK):
        end = tl.where(tl.load(ids + token * TOPK + i) >= 0, width, 0)
        total += tl.load(pairs + (token * TOPK + i) * width + column, mask=column < end, other=0.0)
    if BASE:
        total += tl.load(base + token * width + column, mask=column < width, other=0.0)
    tl.store(y + token * width + column, total, mask=column < width)


def add_pairs(pairs: Tensor, experts: Tensor, base: Tensor | None, shared: bool = False) -> Tensor:
    """f32 [T, width] = base + the sum of each token's `pairs` [T * topk, width], in the order of `experts`, contiguous
    [T, topk]. shared: T rows more lie behind them, one of each token."""
    (tokens, topk), width, pdl = experts.shape, pairs.shape[1], uses_pdl(pairs)
    y = torch.empty(tokens, width, dtype=torch.float32, device=pairs.device)
    _add_pairs[(tokens, triton.cdiv(width, ADDED_COLUMNS))](
        pairs, experts, y if base is None else base, y, width, TOPK=topk, SHARED=shared, BASE=base is not None,
        BLOCK=ADDED_COLUMNS, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return y
